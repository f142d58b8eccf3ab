"""The kind of error by which a user's mistake or a damaged file stops capture, training or evaluation."""


class TrainError(ValueError):
    """One sentence that names the thing and the value, and a `hint` where there is a next step."""

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.hint = hint


class LossError(TrainError):
    """Numbers of a run that are none any more. All its processes raise it together; runs beside it can go on."""


class GoneError(TrainError):
    """Another process of the run is gone, so that this one cannot go on either."""
