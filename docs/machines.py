"""The table in docs/models.md: what emlocal chooses for two machines, given as numbers.

python docs/machines.py            prints the table (a test fails if docs/models.md differs from it)
"""

from emlocal.models.choice import Fit, Room, best, fit
from emlocal.models.resolve import catalog
from emlocal.text import human_size

MACHINES = {
    "8 GB, no GPU": Room(6_000_000_000),
    "24 GB, a GPU of 12 GB": Room(22_000_000_000, (11_500_000_000,)),
}
"""Of the main memory 2 GB are taken, of the GPU's 0.5 GB."""
SHOWN = ("qwen3.5:4b", "qwen3.5:9b", "qwen3:14b", "gpt-oss:20b", "qwen3.5:27b")


def table() -> str:
    """Returns the table in Markdown."""
    rows = [
        ["", *MACHINES],
        ["---"] * (1 + len(MACHINES)),
        ["free memory", *map(_free, MACHINES.values())],
        ["`models list`: fits", *map(_count, MACHINES.values())],
        ["does not fit", *map(_too_large, MACHINES.values())],
        ["`-m auto`", *map(_best, MACHINES.values())],
        *([f"`--gpu-layers auto`, {alias}", *_layers(alias)] for alias in SHOWN),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _free(room: Room) -> str:
    return " and ".join([human_size(room.memory), *(f"{human_size(g)} on the GPU" for g in room.gpus)])


def _fits(room: Room) -> dict[str, Fit]:
    return {alias: fit(entry, room) for alias, entry in catalog().items()}


def _count(room: Room) -> str:
    found = _fits(room).values()
    whole = sum(f.fits and f.describe() == "on the GPU" for f in found)
    gpu = f", {whole} of them whole on the GPU" if room.gpus else ""
    return f"{sum(f.fits for f in found)} of {len(catalog())}{gpu}"


def _too_large(room: Room) -> str:
    return ", ".join(alias for alias, found in _fits(room).items() if not found.fits) or "none"


def _best(room: Room) -> str:
    entry = best(room)
    return f"{entry.alias}, {human_size(entry.bytes)}" if entry else "none"


def _layers(alias: str) -> list[str]:
    found = [(room, fit(catalog()[alias], room)) for room in MACHINES.values()]
    return [
        "does not fit" if not f.fits else f"{f.offload.layers} of {f.layers} layers" if room.gpus else "CPU"
        for room, f in found
    ]


if __name__ == "__main__":
    print(table())
