"""The store without vLLM: blocks go in, and come back from memory and from files.

    python examples/store_roundtrip.py [DIRECTORY]

Shows what an engine does with the store, layer by layer, in a temporary directory unless an empty
one is given. Says what it does; exits with 1 if any byte is wrong. Leaves no process behind.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import shake_128
from pathlib import Path

from ucm.store.pipeline import UcmPipelineStore

NUM_BLOCKS = 16
NUM_LAYERS = 8
TENSOR_BYTES = 64 << 10  # K, and as much for V, of one block and layer
IDLE_EXIT_S = 1.0

Layer = list[list[bytearray]]


def config(directory: Path) -> dict[str, object]:
    """What UCM's users know as ucm_connector_config, with the sizes of a block."""
    return {
        "store_pipeline": "Cache|Posix",
        "storage_backends": str(directory / "store"),
        "cache_buffer_capacity_gb": 0.125,
        "tensor_size_list": [TENSOR_BYTES, TENSOR_BYTES],
        "block_size": NUM_LAYERS * 2 * TENSOR_BYTES,
        "shard_size": 2 * TENSOR_BYTES,
        # Only because this example has a node cache of its own, and wants it gone afterwards.
        "node_cache_socket": str(directory / "node.sock"),
        "node_cache_idle_exit_s": IDLE_EXIT_S,
    }


def kv_of(block_id: bytes, layer: int) -> list[bytearray]:
    """K and V as a model would have computed them: always the same for the same block."""
    return [
        bytearray(shake_128(block_id + bytes([layer, part])).digest(TENSOR_BYTES))
        for part in range(2)
    ]


def dump(store: UcmPipelineStore, block_ids: list[bytes]) -> None:
    """One task per layer, as an engine makes them while the next layer is being computed."""
    started_s = time.perf_counter()
    layers = [[kv_of(block_id, layer) for block_id in block_ids] for layer in range(NUM_LAYERS)]
    computed_s = time.perf_counter()
    tasks = [
        store.dump_data(block_ids, [layer] * len(block_ids), rows)
        for layer, rows in enumerate(layers)
    ]
    for task in tasks:
        store.wait(task)
    print(
        f"   {len(tasks)} tasks, one per layer: {1000 * (time.perf_counter() - computed_s):.1f} ms"
    )
    print(f"   (making up their contents took {1000 * (computed_s - started_s):.0f} ms)")


def load(store: UcmPipelineStore, block_ids: list[bytes]) -> None:
    """Raises SystemExit if a byte is not what was dumped."""
    started_s = time.perf_counter()
    layers: list[Layer] = []
    tasks = []
    for layer in range(NUM_LAYERS):
        layers.append([[bytearray(TENSOR_BYTES) for _ in range(2)] for _ in block_ids])
        tasks.append(store.load_data(block_ids, [layer] * len(block_ids), layers[layer]))
    for task in tasks:
        store.wait(task)
    elapsed_s = time.perf_counter() - started_s
    for layer, rows in enumerate(layers):
        for block_id, row in zip(block_ids, rows, strict=True):
            if row != kv_of(block_id, layer):
                sys.exit(f"block {block_id.hex()}, layer {layer}: not the bytes that were dumped")
    mebibytes = len(block_ids) * NUM_LAYERS * 2 * TENSOR_BYTES / (1 << 20)
    print(f"   {mebibytes:.0f} MiB in {1000 * elapsed_s:.1f} ms, every byte is right")


def expect(what: str, expected: object, found: object) -> None:
    print(f"   {what}: {found}")
    if found != expected:
        sys.exit(f"{what}: expected {expected}, found {found}")


def roundtrip(directory: Path) -> None:
    prompt = [f"block {i}".encode() for i in range(NUM_BLOCKS)]
    longer_prompt = [*prompt, b"one that nobody has computed"]
    files = directory / "store"
    if files.exists():
        sys.exit(f"{files} is there already: give an empty directory")

    print("1. A store, and its node cache, which is started because there is none.")
    with UcmPipelineStore(config(directory)) as store:
        expect("last block of the prompt that is there", -1, store.lookup_on_prefix(prompt))

        print(f"2. Dumping {NUM_BLOCKS} blocks of {NUM_LAYERS} layers.")
        dump(store, prompt)
        expect("last block that is there", NUM_BLOCKS - 1, store.lookup_on_prefix(longer_prompt))
        expect("is the longer prompt's last block there", False, store.lookup(longer_prompt)[-1])

        print("3. Loading them, from the node cache's memory.")
        load(store, prompt)

        print("4. Waiting for the files.")
        store.flush()
        expect("files", NUM_BLOCKS, len(list(files.rglob("*.kv"))))

    wait_until_left(directory)
    print("5. The node cache has left, and its memory with it. Another one reads the files.")
    with UcmPipelineStore(config(directory)) as store:
        expect("last block that is there", NUM_BLOCKS - 1, store.lookup_on_prefix(longer_prompt))
        load(store, prompt)
    wait_until_left(directory)
    print("All is as it was dumped, and nothing is left running.")


def wait_until_left(directory: Path) -> None:
    """The node cache takes its socket away when it leaves."""
    deadline_s = time.monotonic() + IDLE_EXIT_S + 30
    while (directory / "node.sock").exists():
        if time.monotonic() > deadline_s:
            sys.exit("the node cache does not leave")
        time.sleep(0.05)


@contextmanager
def directory_of_arguments() -> Iterator[Path]:
    if len(sys.argv) > 1:
        yield Path(sys.argv[1]).resolve()
    else:
        with tempfile.TemporaryDirectory(prefix="ucm-") as directory:
            yield Path(directory)


if __name__ == "__main__":
    with directory_of_arguments() as made:
        roundtrip(made)
