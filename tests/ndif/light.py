"""Turns NDIF's own parts into one process that serves on loopback: API, keys, payloads, model actor; no Ray.

    python light.py PORT REDIS_PORT STORE_PORT

Real: the API app with its key and version checks, the pickled request through redis, `run` of the model actor
(deserialising, executing, time-out, words of errors, results by inline bytes or signed address). Stood in for,
by the forty lines of `serve`: Ray, controller, queue positions; hence no /status and no /env.

Environment: NDIF's own names; NSTEER_NDIF_KNOBS, a JSON file read before each job:
`slow`, seconds to wait, so that a test can kill something in the middle; `timeout`, seconds a block may run; `end`,
words with which the job is ended instead of run, as a server that lost its replica would; `lose`, to drop it without
a word, as a server would whose worker dies. Jobs that are not trusted go to an actor of their own, with a sandbox.
"""

import anyio._backends._asyncio  # noqa: F401, I001 - before nnsight: its object.save breaks anyio's import

import asyncio
import json
import os
import pickle
import sys
from pathlib import Path

PORT, REDIS, STORE = map(int, sys.argv[1:4])
os.environ |= {
    "NDIF_REDIS_URL": f"redis://127.0.0.1:{REDIS}",
    "NDIF_OBJECT_STORE_URL": f"http://127.0.0.1:{STORE}",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # or asking Ray for its context starts a cluster
    "RAY_USAGE_STATS_ENABLED": "0",
    "AWS_EC2_METADATA_DISABLED": "true",
}
sys.path.insert(0, str(Path(__file__).parent))

import uvicorn  # noqa: E402
from cpu_actors import OnCPU, SandboxOnCPU  # noqa: E402
from ndif.common.providers.redis import RedisProvider  # noqa: E402
from ndif.common.schema import Status  # noqa: E402
from ndif.services.api.app import app  # noqa: E402
from ndif.services.api.queue.config import CONFIG  # noqa: E402
from nnsight.modeling.mixins.remotable import Remotable  # noqa: E402

DTYPE = os.environ.get("NDIF_DEFAULT_DTYPE", "float32")


def knobs():
    file = Path(os.environ.get("NSTEER_NDIF_KNOBS", "/nowhere"))
    return json.loads(file.read_text()) if file.exists() else {}


async def serve(request, models, locks):
    """One request from queue to result, one at a time for each model."""
    key = request.model_key
    actor = OnCPU if request.trusted else SandboxOnCPU
    place = (key, actor)
    try:
        await request.arespond(Status.QUEUED, "Added to Queue at position 1.")
        async with locks.setdefault(place, asyncio.Lock()):
            if place not in models:
                await request.arespond(Status.DEPLOYING, "Model Deploying...")
                try:
                    await asyncio.to_thread(Remotable.describe_checkpoint, key, DTYPE)
                    models[place] = await asyncio.to_thread(actor, key, None, {}, DTYPE)
                except Exception as error:
                    await request.arespond(Status.ERROR, f"Could not deploy this model. {error}"[:1500])
                    return
            await request.arespond(Status.DISPATCHED, "Your job has been sent to the model deployment.")
            turned = knobs()
            await asyncio.sleep(turned.get("slow", 0))
            if turned.get("lose"):
                return
            if turned.get("end"):
                await request.arespond(Status.ERROR, turned["end"])
                return
            models[place].execution_timeout = turned.get("timeout")
            await models[place].run(request)
            print("ran", request.id, key, flush=True)
    except Exception as error:
        print("failed", request.id, repr(error), flush=True)
        await request.arespond(Status.ERROR, "Error submitting request to model deployment.")


async def work():
    """Draws requests from redis for ever."""
    while not RedisProvider.connected():
        await asyncio.sleep(0.05)
    await RedisProvider.async_client.set("ray:connected", "1")
    models, locks, running = {}, {}, set()
    while True:
        item = await RedisProvider.async_bytes_client.brpop(CONFIG.queue_key, timeout=5)
        if item:
            task = asyncio.create_task(serve(pickle.loads(item[1]), models, locks))
            running.add(task)
            task.add_done_callback(running.discard)


async def main():
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=PORT, log_level="warning", ws_max_size=1 << 30))
    worker = asyncio.create_task(work())
    await server.serve()
    worker.cancel()


if __name__ == "__main__":
    asyncio.run(main())
