"""What a run measured, and samples of what it generated, in MLflow.

The Tracker is the only writer of a run. It never stops training: what MLflow cannot take now lies in the run's
directory and is delivered when it can. Its callers wait for a line appended to a local file at most; MLflow itself
lives in a thread of the Tracker.
"""

from raygrpo.tracking.describe import commit_tags
from raygrpo.tracking.store import resolve_tracking_uri, ui_command
from raygrpo.tracking.tracker import Links, Tracker, read_history, replay

__all__ = ["Links", "Tracker", "commit_tags", "read_history", "replay", "resolve_tracking_uri", "ui_command"]
