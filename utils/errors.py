"""User errors: reported once, all together, each with the flag, the value and the remedy."""

from __future__ import annotations


class UserError(Exception):
    """Something that the person at the keyboard can fix; printed without a traceback, exit code 2.

    Args:
        problems: one message, or several that the same check found. Each names the flag and its value, and says
            what is wrong and what to do about it.
    """

    def __init__(self, problems: str | list[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self):  # crosses process boundaries inside Ray's and pickle's own wrappers
        return (type(self), (self.problems,))


class Problems:
    """Collects what an up-front check finds, so that the user hears of everything at once."""

    def __init__(self):
        self.found: list[str] = []

    def add(self, problem: str) -> None:
        self.found.append(problem)

    def collect(self, check, *args, **kwargs):
        """Call `check`; keep its `UserError`, if it raises one, and return None then."""
        try:
            return check(*args, **kwargs)
        except UserError as error:
            self.found.extend(error.problems)

    def raise_if_any(self) -> None:
        if self.found:
            raise UserError(self.found)
