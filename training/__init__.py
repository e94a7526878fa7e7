"""Train, calibrate and evaluate the networks. Needs the extra `train`; the daemon does not."""
