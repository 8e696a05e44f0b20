"""Sizes and times as people read them."""


def format_bytes(count: float, digits: int = 3) -> str:
    """In the unit that leaves at most `digits` digits (3 or 4) before the point: 1536 is "1.5 KiB"."""
    limit = min(1024, 10**digits)
    for unit in ("B", "KiB", "MiB"):
        if count < limit:
            return f"{count:.{digits}g} {unit}"
        count /= 1024
    return f"{count:.{digits}g} GiB"


def format_duration(seconds: float) -> str:
    """In the two largest units: 328 is "5 min 28 s"."""
    whole = round(seconds)
    for unit, size, smaller, smaller_size in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller_size} {smaller}"
    return f"{whole} s"
