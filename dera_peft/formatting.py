"""Numbers of bytes as people read them."""


def format_bytes(count: float, digits: int = 3) -> str:
    """In the unit that leaves at most `digits` digits (3 or 4) before the point: 1536 is "1.5 KiB"."""
    limit = min(1024, 10**digits)
    for unit in ("B", "KiB", "MiB"):
        if count < limit:
            return f"{count:.{digits}g} {unit}"
        count /= 1024
    return f"{count:.{digits}g} GiB"
