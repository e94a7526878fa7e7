"""Model bundles: trust policy, loading, proof on the golden picture, and scoring."""

from dataclasses import dataclass, replace
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from lungwatch.bundle import GATE_FILE, MODEL_FILE, BundleFiles, SiteCalibration, read_bundle
from lungwatch.comparison import DriftReference
from lungwatch.contract import (
    CAM,
    CAM_PEAK,
    EMBEDDING,
    FINDING_CAMS,
    FINDING_PEAKS,
    FINDINGS,
    INPUT,
    LOGITS,
    METADATA_KEY,
    OUTPUTS,
    PROBABILITY,
    Calibration,
    ModelContract,
)
from lungwatch.daemon.pipeline.gate import (
    ContentGate,
    check_signature,
    open_session,
    require_golden_answers,
)
from lungwatch.daemon.pipeline.records import Scores
from lungwatch.errors import ModelError, NotFoundError
from lungwatch.models import SHIPPED_STATEMENTS
from lungwatch.preprocess import golden_digest, golden_input

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    from lungwatch.daemon.config import Config


_WHAT_TO_DO = "sign it with `lungwatch model sign`, or add the signer's key to 'trusted_keys'"


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Origin of a bundle: its signer, and whether it is trusted.

    Attributes
    ----------
    signer
        Fingerprint of the key that its signature names; None without a signature that can be
        read. It is verified only where `is_trusted` is set.
    is_shipped
        Whether its bytes and its folder's name are those that this package was released with.
    is_trusted
        Whether a trusted key made the signature, or the bundle is a shipped one.
    fault
        Why it is not trusted; None if it is.
    """

    signer: str | None
    is_shipped: bool
    is_trusted: bool
    fault: str | None

    @property
    def text(self) -> str:
        """One clause for people."""
        if self.is_shipped:
            return "shipped with this package"
        if self.signer is None:
            return "not signed"
        return f"signed by {self.signer} ({'trusted' if self.is_trusted else 'not checked'})"


@dataclass(frozen=True, kw_only=True)
class BundlePolicy:
    """Bundle trust policy: any bundle, or only those that ship or that a trusted key signed.

    Attributes
    ----------
    keys
        Trusted public keys by fingerprint; None: any bundle.
    """

    keys: "Mapping[str, Ed25519PublicKey] | None" = None

    @classmethod
    def of(cls, config: "Config") -> Self:
        """Read the keys that a configuration names.

        Raises
        ------
        ConfigError
            If `trusted_keys` is set and no keys can be read there.
        """
        if not config.trusted_keys:
            return cls()
        # Imports `cryptography`, which only this policy needs.
        from lungwatch.signing import load_public_keys  # noqa: PLC0415

        return cls(keys=load_public_keys(Path(config.trusted_keys).expanduser()))

    def provenance(self, files: BundleFiles) -> Provenance:
        """Return the origin of a bundle, trusted or not."""
        statement = files.statement()
        name = files.folder.absolute().name
        is_shipped = SHIPPED_STATEMENTS.get(name) == sha256(statement).hexdigest()
        signer, fault = None, None
        if files.signature is None:
            fault = "it is not signed"
        else:
            from lungwatch.signing import Signature  # noqa: PLC0415 - see above

            try:
                signature = Signature.from_bytes(files.signature)
            except ModelError as error:
                fault = str(error)
            else:
                signer = signature.fingerprint
                key = (self.keys or {}).get(signer)
                if key is None:
                    fault = f"its signer's key {signer} is not trusted"
                elif not signature.is_of(key, statement):
                    fault = "its signature is not of these files: one was altered since"
        if is_shipped:
            fault = None
        elif fault is None and name != files.id:
            # Else one signed bundle could replace another.
            fault = f"it was signed as '{files.id}', not as '{name}'"
        return Provenance(
            signer=signer, is_shipped=is_shipped, is_trusted=fault is None, fault=fault
        )

    def check(self, files: BundleFiles) -> None:
        """Refuse a bundle that is not trusted.

        Raises
        ------
        ModelError
            If there are trusted keys, none of them signed these bytes and it does not ship.
        """
        if self.keys is None:
            return
        found = self.provenance(files)
        if not found.is_trusted:
            raise ModelError(
                f"the model bundle {files.folder} is refused: {found.fault}; {_WHAT_TO_DO}"
            )


_OPTIONAL = (CAM_PEAK, FINDINGS, FINDING_CAMS, FINDING_PEAKS)


def list_bundles(home: Path | None = None) -> list[Path]:
    """Return the folders of the shipped bundles and of those in `<home>/models`."""
    folders = [Path(str(resources.files("lungwatch.models")))]
    if home is not None:
        folders.append(home / "models")
    # The shipped ones first: no other bundle replaces one by its name.
    return [
        bundle
        for folder in folders
        if folder.is_dir()
        for bundle in sorted(folder.iterdir())
        if (bundle / MODEL_FILE).is_file()
    ]


def find_bundle(name_or_path: str, home: Path | None = None) -> Path:
    """Return the folder of a bundle, by its name ("baseline-1.1.0") or its path.

    Raises
    ------
    NotFoundError
        If there is none; the message lists the names that exist.
    """
    path = Path(name_or_path)
    if path.name == MODEL_FILE and path.is_file():
        return path.parent
    if (path / MODEL_FILE).is_file():
        return path
    bundles = list_bundles(home)
    for bundle in bundles:
        if bundle.name == name_or_path:
            return bundle
    names = ", ".join(bundle.name for bundle in bundles) or "none"
    raise NotFoundError(f"no model bundle '{name_or_path}'; there are: {names}")


class Classifier:
    """An onnxruntime session, its contract, the bundle's content gate and reference for drift.

    Safe to call from several threads, though the daemon has only one that does.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        contract: ModelContract,
        sha256: str,
        gate: ContentGate | None = None,
        drift: DriftReference | None = None,
    ) -> None:
        self._session = session
        self.contract = contract
        self.sha256 = sha256
        self.gate = gate
        self.drift = drift
        names = {item.name for item in session.get_outputs()}
        # A graph of contract 1 does not tell the peaks of its maps, one of contract 2 has no
        # findings beside COVID, and theirs may come without maps.
        self._optional = [name for name in _OPTIONAL if name in names]

    @classmethod
    def load(cls, bundle: Path, threads: int = 0, trust: BundlePolicy | None = None) -> Self:
        """Load a bundle and replay its golden picture.

        Parameters
        ----------
        bundle
            Folder with `model.onnx`, `bundle.json`, and `gate.onnx` if the model has a gate.
        threads
            Of one call; 0 for one per processor.
        trust
            Which bundles are loaded; None: any.

        Raises
        ------
        ModelError
            If a file is missing or altered, the bundle is not trusted, the contract is not
            understood, the contract describes a gate and there is none or the reverse, the
            reference for drift is of another model, or this machine's answer on the golden picture
            is not the recorded one.
        """
        return cls.of(read_bundle(bundle), threads, trust)

    @classmethod
    def of(cls, files: BundleFiles, threads: int = 0, trust: BundlePolicy | None = None) -> Self:
        """Load a bundle that was read already; see `load`."""
        (trust or BundlePolicy()).check(files)
        files.check_digests()
        path = files.folder / MODEL_FILE
        session = open_session(files.model, path, threads)
        text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
        if text is None:
            raise ModelError(f"{path} carries no contract; export it with `lungwatch export`")
        contract = ModelContract.from_json(text)
        check_signature(session, path, (*OUTPUTS, *((FINDINGS,) if contract.findings else ())))
        gate = _load_gate(files, contract, threads)
        drift = load_drift(files, contract)
        classifier = cls(session, contract, files.model_sha256, gate, drift)
        classifier.check_golden()
        return classifier

    def calibrated(self, site: SiteCalibration) -> Self:
        """Return the same model with a site's probability, threshold and band."""
        contract = replace(self.contract, calibration=site.calibration, decision=site.decision)
        return type(self)(self._session, contract, self.sha256, self.gate, self.drift)

    def run(self, batch: NDArray[np.float32]) -> list[Scores]:
        """Score images.

        Parameters
        ----------
        batch
            float32, shape (n, size, size, 1), 0..1: stacked results of `preprocess`.

        Returns
        -------
        list of Scores
            One an image, in order.
        """
        names = [LOGITS, CAM, EMBEDDING, *self._optional]
        answers = dict(zip(names, self._session.run(names, {INPUT: batch}), strict=True))
        scores = []
        for index, (logit_pair, cam, embedding) in enumerate(
            zip(answers[LOGITS], answers[CAM], answers[EMBEDDING], strict=True)
        ):
            rest = {name: answers[name][index] for name in self._optional}
            # Two logits (-z/2, z/2) under softmax are one logit z under the sigmoid.
            logit = float(logit_pair[1] - logit_pair[0])
            probability = self.contract.calibration.probability(logit)
            scores.append(
                Scores(
                    probability=probability,
                    logit=logit,
                    label=self.contract.decision.label(probability),
                    cam=cam,
                    embedding=embedding,
                    cam_peak=rest.get(CAM_PEAK),
                    further=self.contract.probabilities([float(z) for z in rest[FINDINGS]])
                    # A graph may score findings that its contract does not name.
                    if self.contract.findings
                    else {},
                    further_cams=rest.get(FINDING_CAMS),
                    further_peaks=rest.get(FINDING_PEAKS),
                )
            )
        return scores

    def check_golden(self) -> None:
        """Compare this machine's answer on the golden picture with the contract's.

        Raises
        ------
        ModelError
            If they differ by more than the contract's tolerance.
        """
        golden = self.contract.golden
        if golden.input_sha256 != golden_digest():
            raise ModelError("the model was made with another golden picture; export it again")
        batch = golden_input(self.contract.preprocess)[np.newaxis]
        findings = self.contract.findings
        names = [PROBABILITY, CAM, *([FINDINGS] if findings else [])]
        probability, cam, *logits = self._session.run(names, {INPUT: batch})
        further = [Calibration().probability(float(z)) for z in np.ravel(logits)]
        if len(further) != len(findings):
            raise ModelError(
                f"the model {self.contract.id} scores {len(further)} findings, its contract names "
                f"{len(findings)}"
            )
        answers = [
            ("probability", float(np.ravel(probability)[0]), golden.probability),
            ("mean of the maps", float(np.mean(cam[0])), golden.cam_mean),
        ]
        for finding, found, expected in zip(findings, further, golden.findings, strict=True):
            answers.append((f"probability of '{finding.name}'", found, expected))
        require_golden_answers(f"the model {self.contract.id}", answers, golden.tolerance)


def load_drift(files: BundleFiles, contract: ModelContract) -> DriftReference | None:
    """Read the bundle's reference for drift; None if it has none.

    Raises
    ------
    ModelError
        If it is damaged or of another model.
    """
    if files.drift is None:
        return None
    return DriftReference.from_json(files.drift, contract.embedding_size)


def _load_gate(files: BundleFiles, contract: ModelContract, threads: int) -> ContentGate | None:
    """Load the gate that the contract describes; the two come together or not at all."""
    if contract.gate is None and files.gate is None:
        return None
    if contract.gate is None:
        raise ModelError(
            f"{files.folder} has a {GATE_FILE} of which the model's contract says nothing"
        )
    if files.gate is None:
        raise ModelError(
            f"{files.folder / GATE_FILE} is missing: the model's contract describes a content gate"
        )
    return ContentGate.of(files.gate, contract.gate, files.folder, threads)


@dataclass(frozen=True, kw_only=True)
class ModelInUse:
    """The model that this daemon runs, as it is entered in the database.

    Attributes
    ----------
    row
        Number of its row.
    calibration
        The site calibration that the classifier decides by; None for the bundle's own.
    """

    classifier: Classifier
    row: int
    calibration: SiteCalibration | None = None

    @property
    def id(self) -> str:
        """Name and version, as people write it."""
        return self.classifier.contract.id
