"""The shipped model bundles, one folder each: `model.onnx`, its card, and their digests."""

from collections.abc import Mapping

SHIPPED_DEFAULT = "guided-1.1.0"

# What the package vouches for: the SHA-256 of each bundle's statement (lungwatch.bundle), so that
# the shipped bundles need no signature where signatures are asked for.
SHIPPED_STATEMENTS: Mapping[str, str] = {
    "baseline-1.1.0": "8bdface5f9832d549bddba7c1a5474412d6d53982146f325aa117004ef1072f6",
    "guided-1.1.0": "77c975db10e3a7d4ed48e3bf8e0599f119cee874a53c98f3a73db3d41d5ba2ca",
}
