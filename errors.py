from cli import UserError, run  # noqa: F401
