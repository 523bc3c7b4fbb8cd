"""What the chain refuses. The class tells the kind; `rpc` has the number of each in JSON-RPC."""


class ChainError(Exception):
    """A request that the chain refuses."""


class InvalidParamsError(ChainError):
    """Parameters of another number, type or form."""


class UnknownMethodError(ChainError):
    """A method that this chain does not have."""


class InvalidTransactionError(ChainError):
    """A transaction that cannot be mined: its form, its nonce, its price, or the balance of its sender."""


class UnknownStateError(ChainError):
    """A block or snapshot that does not exist."""


class ExecutionRevertedError(ChainError):
    """A call that the contract reverted; `data` is what it returned."""

    def __init__(self, message: str, data: bytes) -> None:
        super().__init__(message)
        self.data = data


class ExecutionFailedError(ChainError):
    """A call that the EVM ended, for example because its gas was used up."""


class StoreError(ChainError):
    """A file with the state of a chain that cannot be used."""
