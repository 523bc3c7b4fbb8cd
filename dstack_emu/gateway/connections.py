"""How many connections the ingress holds open, in all and to each instance."""

from collections import Counter


class Connections:
    """Counts. The ingress calls `accepted` and `ended` in pairs, and `opened` and `closed`, with an instance's id."""

    def __init__(self) -> None:
        self.total = 0
        """All connections of clients, those whose server name is not known yet among them."""
        self._by_instance: Counter[str] = Counter()

    def accepted(self) -> None:
        """Count one client more."""
        self.total += 1

    def ended(self) -> None:
        """Count one client less."""
        self.total -= 1

    def opened(self, instance_id: str) -> None:
        """Count one connection to an instance more, when it begins to be opened."""
        self._by_instance[instance_id] += 1

    def closed(self, instance_id: str) -> None:
        """Count one connection to an instance less."""
        self._by_instance[instance_id] -= 1
        if not self._by_instance[instance_id]:
            del self._by_instance[instance_id]

    def of(self, instance_id: str) -> int:
        """Return the number of connections to an instance."""
        return self._by_instance[instance_id]
