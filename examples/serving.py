"""Train a little, let rows grow, then write every form that can be served and read it back.

python examples/serving.py --out runs/serving
"""

import argparse
import logging
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from esapn_kernels import ResizableEmbedding


def train(rows: int) -> ResizableEmbedding:
    """Rows that learn random targets; the more often a row is seen, the larger it becomes."""
    emb = ResizableEmbedding(rows, 64, init_std=0.1)
    target = torch.randn(rows, 64)
    optimizer = torch.optim.Adam(emb.parameters(), lr=0.01)
    for step in range(60):
        ids = (rows * torch.rand(256) ** 4).long()  # low ids are the frequent ones
        loss = (emb(ids) - target[ids]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            emb.promote(ids[:64])
    emb.compact()
    return emb.requires_grad_(False)


def write(emb: ResizableEmbedding, folder: Path, onnx: bool) -> dict[str, Path]:
    """One file per form."""
    ids = torch.zeros(2, dtype=torch.int64)
    batch = ({0: torch.export.Dim("batch", min=1, max=1 << 20)},)
    dense = emb.to_embedding().eval()
    # torch's exporters speak of parts of their own, and of packages that are not needed.
    warnings.simplefilter("ignore")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    files = {name: folder / name for name in ("dense.pt2", "ragged.pt2", "ragged.safetensors")}
    for name, module in (("dense.pt2", dense), ("ragged.pt2", emb)):
        torch.export.save(torch.export.export(module, (ids,), dynamic_shapes=batch), files[name])
    save_file(emb.state_dict(), files["ragged.safetensors"])
    if onnx:
        files["dense.onnx"] = folder / "dense.onnx"
        torch.onnx.export(
            dense,
            (ids,),
            files["dense.onnx"],
            dynamo=True,
            dynamic_shapes=batch,
            external_data=False,
            verbose=False,
        )
    return files


def read(
    files: dict[str, Path], emb: ResizableEmbedding, ids: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What every file says of ``ids``."""
    found = {}
    for name, path in files.items():
        if path.suffix == ".pt2":
            found[name] = torch.export.load(path).module()(ids)
        elif path.suffix == ".safetensors":
            fresh = ResizableEmbedding(emb.num_embeddings, sizes=emb.sizes, init=emb.init)
            fresh.load_state_dict(load_file(path))
            found[name] = fresh(ids)
        else:
            import onnxruntime

            session = onnxruntime.InferenceSession(path)
            (name_of_ids,) = (i.name for i in session.get_inputs())
            found[name] = torch.from_numpy(session.run(None, {name_of_ids: ids.numpy()})[0])
    return found


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000, help="rows of the table")
    parser.add_argument("--out", type=Path, default=Path("runs/serving"), help="folder to write to")
    parser.add_argument("--no-onnx", action="store_true", help="leave the ONNX file out")
    options = parser.parse_args(arguments)
    if options.rows < 1:
        parser.error("--rows must be at least 1")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out must be a folder, {options.out} is a file")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    emb = train(options.rows)
    print(emb.memory_report(), end="\n\n")
    ids = (options.rows * torch.rand(100) ** 4).long()
    files = write(emb, options.out, not options.no_onnx)
    errors = {}
    for name, found in read(files, emb, ids).items():
        errors[name] = float((found - emb(ids)).detach().abs().max())
        print(f"{name:<20}{files[name].stat().st_size:>12,} B   largest error {errors[name]:.1e}")
    return errors


if __name__ == "__main__":
    main()
