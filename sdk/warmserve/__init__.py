"""WarmServe's client: text from any model that a WarmServe cluster has deployed, warm or cold.

with warmserve.Client("127.0.0.1:8000") as client:
    completion = client.chat("my-model", [{"role": "user", "content": "Hello"}], max_tokens=100)
    print(completion.text)
"""

from warmserve.aio import AsyncClient, AsyncCompletionStream
from warmserve.client import Client, CompletionStream
from warmserve.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    ModelNotFoundError,
    QueueFullError,
    RequestCancelledError,
    UnavailableError,
    WarmServeError,
)
from warmserve.types import (
    Announcement,
    Choice,
    Completion,
    Message,
    ModelInfo,
    Options,
    Progress,
    TextDelta,
    Timing,
    TokenLogprob,
    TopLogprob,
    Usage,
)

__all__ = [
    "Announcement",
    "AsyncClient",
    "AsyncCompletionStream",
    "Choice",
    "Client",
    "Completion",
    "CompletionStream",
    "DeadlineExceededError",
    "InvalidRequestError",
    "Message",
    "ModelInfo",
    "ModelNotFoundError",
    "Options",
    "Progress",
    "QueueFullError",
    "RequestCancelledError",
    "TextDelta",
    "Timing",
    "TokenLogprob",
    "TopLogprob",
    "UnavailableError",
    "Usage",
    "WarmServeError",
]
