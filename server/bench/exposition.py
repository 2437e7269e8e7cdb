"""A server's own metrics, in Prometheus' text format."""

import httpx

from server.bench.load import Served
from server.bench.target import BenchError


async def read(served: Served) -> str:
    """Of the server's operators' listener, which is known. Raises BenchError."""
    url = f"{served.target.admin_url}/metrics"
    try:
        response = await served.client.get(url)
        response.raise_for_status()
    except httpx.HTTPError as error:
        raise BenchError(f"{url}: {error!r}") from error
    return response.text


def total(text: str, name: str) -> float | None:
    """The sum over all series of a name, which has labels; None where there are none."""
    lines = [line for line in text.splitlines() if line.startswith(f"{name}{{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines) if lines else None
