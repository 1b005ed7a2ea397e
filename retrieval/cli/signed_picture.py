"""Prints the signed statement in a picture: its signer, whether it is unchanged, and its neighbors."""

from pathlib import Path

from retrieval.cli.contact_sheet import printable
from retrieval.errors import UserError

VALID = {
    True: "unchanged since it was signed",
    False: "NOT VALID: changed since it was signed, or its certificate has expired (see the failed checks)",
}
TRUSTED = {
    True: "trusted: an authority in the given file confirms it",
    False: "not trusted: no known authority confirms it (name authorities with --authorities)",
}


def print_signature(picture: Path, authorities: Path | None) -> bool:
    """Print the statement in a PNG or JPEG file. Returns whether it is valid, and trusted if authorities are given."""
    from retrieval.provenance import read_signature

    try:
        data = picture.read_bytes()
        certificates = authorities.read_bytes() if authorities else b""
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error}") from error
    signed = read_signature(data, certificates)
    if signed is None:
        print(f"{picture}: no signed statement (C2PA manifest)")
        return False
    print(f"{picture}: {VALID[signed.is_valid]}")
    print(f"signer: {printable(signed.signer)}, {TRUSTED[signed.is_trusted]}")
    if signed.problems:
        print(f"failed checks: {', '.join(map(printable, signed.problems))}")
    print(f"made by {printable(signed.generator)}")
    for name, value in signed.digests.items():
        print(f"{printable(name)}: {printable(str(value))}")
    print(f"{len(signed.neighbors)} neighbors" + (", best first:" if signed.neighbors else ""))
    for neighbor in signed.neighbors:
        similarity = neighbor.get("similarity")
        shown = f"{similarity:.3f}" if isinstance(similarity, float) else "?"
        values = [neighbor.get(key, "") for key in ("database", "image_id", "caption", "url", "license", "creator")]
        print("  ".join([shown, *(printable(str(value)) for value in values if value != "")]))
    return signed.is_valid and (signed.is_trusted or authorities is None)
