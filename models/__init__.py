"""The shipped model bundles, one folder each: `model.onnx`, its card, and their digests."""

from collections.abc import Mapping

SHIPPED_DEFAULT = "guided-1.0.0"

# What the package vouches for: the SHA-256 of each bundle's statement (lungwatch.bundle), so that
# the shipped bundles need no signature where signatures are asked for.
SHIPPED_STATEMENTS: Mapping[str, str] = {
    "baseline-1.0.0": "7cd60dba62f0154209ea31f7a85455685d6cafcfc237da903a9d6dd3709e89c7",
    "guided-1.0.0": "b2049203299f6ec5260a4275b0de58fb6d4e144c5c01b6e29ce6770d9c054d48",
}
