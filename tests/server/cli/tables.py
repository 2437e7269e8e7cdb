"""What a printed table says."""


def cells(printed: str) -> list[list[str]]:
    """The rows of every table, without headings; a wrapped row is one row for each line."""
    lines = [line for line in printed.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
