"""Traffic of the past, read from the formats that it comes in. Needs nothing but the standard library.

    for request in read_requests(Path("AzureLLMInferenceTrace_conv.csv.gz")):
        ...

read.py is the door; formats.py tells formats apart and lists their columns.
"""

from warmserve.traces.formats import Format, detect
from warmserve.traces.read import from_zero, read_requests, read_windows
from warmserve.traces.shapes import Request, TraceError, Window

__all__ = ["Format", "Request", "TraceError", "Window", "detect", "from_zero", "read_requests", "read_windows"]
