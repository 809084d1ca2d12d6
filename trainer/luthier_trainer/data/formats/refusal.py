"""How a converter says that a row is wrong."""

from luthier_trainer.data.problem import Problem


class Refusal(Exception):
    """Raised inside this package alone: `convert` turns it into its problem."""

    def __init__(self, code: str, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.problem = Problem(code, message, fix)
