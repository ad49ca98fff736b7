"""Stands in for `python -m research.train` in tests of the search: the same record, made at once from one number `x`.

Further overrides: `delay` (seconds after every epoch but the first, for an `x` below `slow_below`), `fails_above`, and
`kill` with the name of a file: where that exists, it is removed after the first epoch and the worker is killed, with
`kill_both` this process as well.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

EPOCHS = 4


def main() -> None:
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    x = float(given["x"])
    identity = json.dumps({key: given[key] for key in ("name", "x")})
    folder = Path(given["paths.runs"], given["name"], hashlib.sha256(identity.encode()).hexdigest()[:10])
    if (folder / "summary.json").exists():
        print(f"already done: {folder}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    print(f"run folder {folder}\nlayer  weight", flush=True)
    with (folder / "starts").open("a") as file:
        file.write("start\n")
    (folder / "config.yaml").write_text(json.dumps({"trainer": {"max_epochs": EPOCHS}}))
    lines = ["step,epoch,name,value"]
    for epoch in range(EPOCHS):
        lines += [f"{epoch},{epoch},val/accuracy,{x * (epoch + 1)!r}", f"{epoch},,other,1.0"]
        (folder / "metrics.csv").write_text("\n".join(lines) + "\n7,9,val/acc")  # the last line is being written
        if "kill" in given and Path(given["kill"]).exists():
            Path(given["kill"]).unlink()
            os.kill(os.getppid(), signal.SIGKILL)
            if "kill_both" in given:
                os.kill(os.getpid(), signal.SIGKILL)
        (folder / "pid").write_text(str(os.getpid()))
        if epoch > 0 and x < float(given.get("slow_below", 1)):
            time.sleep(float(given.get("delay", 0)))
    if x > float(given.get("fails_above", 1)):
        sys.exit("first line\nerror: x is too large")
    row = {"name": "final", "accuracy": x, "macs": 10 * x, "bops": 1 / x, "nothing": None}
    (folder / "summary.json").write_text(json.dumps({"deployments": [row]}))


if __name__ == "__main__":
    main()
