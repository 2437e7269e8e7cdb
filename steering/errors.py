"""The exceptions of the steering package; `SteeringError` is the base of all."""


class SteeringError(Exception):
    """Base of everything this package raises on purpose; the message is for a person."""


class AnchorError(SteeringError):
    """An anchor set is malformed, empty, unbalanced or repeats evaluation prompts."""


class VectorError(SteeringError):
    """A shift vector set is damaged, or was made for another model, template or layer count."""


class StoreError(SteeringError):
    """A store cannot be opened, read or written, or what it holds is damaged."""


class NotFoundError(StoreError):
    """The store answers and has no such vector set or alias."""


class ConflictError(StoreError):
    """Somebody else has changed a document since the writer read it.

    revisions: of the documents that differ, as they are now (0: deleted).
    """

    def __init__(self, message: str, revisions: dict[str, int]) -> None:
        super().__init__(message)
        self.revisions = revisions


class ReadOnlyError(StoreError):
    """The store's credentials do not let this process write what it was to write."""


class PlanError(SteeringError):
    """A steering setting is out of bounds or contradicts another."""


class ModelError(SteeringError):
    """A model cannot be loaded, or its decoder layers cannot be steered."""


class EvaluationError(SteeringError):
    """A suite, a condition, a run's folder or the server under evaluation is not as it must be."""
