"""The errors a user can cause, and what they say."""

from pathlib import Path


class WPlusError(ValueError):
    """Wrong input: the message says what was expected, what came and what to do."""


class FileError(WPlusError):
    """A file that cannot be used. The message is `path: problem. remedy`."""

    def __init__(self, path: str | Path, problem: str, remedy: str):
        self.path, self.problem, self.remedy = Path(path), problem, remedy
        super().__init__(f"{path}: {problem}. {remedy}")
