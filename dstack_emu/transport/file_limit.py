"""The limit of open files and sockets of this process."""

import resource


def raise_file_limit() -> None:
    """Raise the soft limit of open files to the hard one, which only root can raise."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
