"""warmctl, the admin CLI. Reads and writes cluster state in etcd; needs the `admin` extra.

state.py reads, views.py says what it means (pure), render.py draws it; the commands join them.
"""

from importlib.util import find_spec

if not all(find_spec(module) for module in ("aetcd", "plotext", "redis", "rich", "typer")):
    raise SystemExit("warmctl needs the admin extra: pip install 'warmserve[admin]'")
