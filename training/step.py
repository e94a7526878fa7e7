"""One step of the optimiser, and what it is told about the batch."""

from collections.abc import Callable

from lungwatch.training.data.pixels import FloatArray, KerasModel, Tensor

Step = Callable[[FloatArray, FloatArray], tuple[Tensor, Tensor]]


def make_step(model: KerasModel) -> Step:
    """Make the function that lets a compiled network learn from one batch.

    Returns
    -------
    function
        Of pixels (N, S, S, 1) and targets (N,), 0..1, soft ones included, to the mean
        cross-entropy in nats and the binary logits (N,) before the step.
    """
    import tensorflow as tf

    # Variables must not be made while a graph is traced.
    model.optimizer.build(model.trainable_variables)

    def step(pixels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with tf.GradientTape() as tape:
            logits = model(pixels, training=True)[:, 0]
            losses = tf.nn.sigmoid_cross_entropy_with_logits(labels=targets, logits=logits)
            loss = tf.reduce_mean(losses)
        gradients = tape.gradient(loss, model.trainable_variables)
        model.optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss, logits

    traced: Step = tf.function(step, reduce_retracing=True)
    return traced
