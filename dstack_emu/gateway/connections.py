"""How many connections the ingress holds open, in all and to each instance."""

from collections import Counter


class Connections:
    """Counts; the ingress calls `opened` and `closed` in pairs, with the id of the instance that it reached."""

    def __init__(self) -> None:
        self.total = 0
        self._by_instance: Counter[str] = Counter()

    def opened(self, instance_id: str) -> None:
        """Count one connection more."""
        self.total += 1
        self._by_instance[instance_id] += 1

    def closed(self, instance_id: str) -> None:
        """Count one connection less."""
        self.total -= 1
        self._by_instance[instance_id] -= 1
        if not self._by_instance[instance_id]:
            del self._by_instance[instance_id]

    def of(self, instance_id: str) -> int:
        """Return the number of connections to an instance."""
        return self._by_instance[instance_id]
