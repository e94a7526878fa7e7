"""The shipped model bundles, one folder each: `model.onnx`, its card, and their digests."""

from collections.abc import Mapping

SHIPPED_DEFAULT = "guided-1.1.0"

# What the package vouches for: the SHA-256 of each bundle's statement (lungwatch.bundle), so that
# the shipped bundles need no signature where signatures are asked for.
SHIPPED_STATEMENTS: Mapping[str, str] = {
    "baseline-1.1.0": "7f57e572f81a4d94b0f3e4391da2f4e5cbefd91d831910ab1c6409d0545871eb",
    "guided-1.1.0": "acd0e464cbae78264ad6bbb68c9ca01ae1b4f52960f1b0166d097b44ced5eb98",
}
