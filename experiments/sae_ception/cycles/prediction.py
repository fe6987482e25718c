"""What a trained classifier says of new examples.

    frame = predictions(session, texts(session, "what a dull film", None, None), sae, 5)
"""
from pathlib import Path

import pandas
import torch
from pandas.api.types import is_numeric_dtype

from cycles.examples import outputs
from cycles.session import Session
from cycles.tasks import Task
from lib.environment import InputError, first_line
from lib.models import local_path
from lib.sae import SAE
from lib.texts import has_text, read_documents, tokenise


def texts(session: Session, text: str | None, data: str | None, column: str | None) -> Task:
    """New texts as a task without splits: `text` alone, or a column of a file; one without a token is refused."""
    column = column or session.c["TEXT_FIELD"]
    try:
        rows = [] if text else read_documents(data or "", text_field=column, blank_lines=True)
        found = [text] if text else [row[column] for row in rows]
    except InputError as error:
        raise InputError(str(error).replace("DATASET=", "DATA=", 1).replace("set DATASET", "set DATA")) from None
    texts_in = [words for words in found if has_text(words)]
    tokens = tokenise(session.tokenizer, texts_in, 0, session.c["MAX_LENGTH"])
    if len(texts_in) < len(found) or not all(item.ids for item in tokens):
        empty = next(i for i, words in enumerate(found) if not has_text(words) or not tokens[i].ids)
        raise InputError(f"text {empty + 1:,} is blank; give it words, or leave its row out of DATA")
    return Task(torch.zeros(len(found), dtype=torch.long), session.task.n_classes, {}, texts=found, tokens=tokens,
                pad_id=session.task.pad_id)


def numbers(session: Session, data: str) -> Task:
    """The rows of a .csv file as inputs of the module: one column for each of its numbers, in its order."""
    images = session.task.images
    assert images is not None
    shape = images.shape[1:]
    try:
        path = local_path(data) or Path(data)
        first = pandas.read_csv(path, header=None, nrows=1)
        frame = pandas.read_csv(path)
        x = torch.tensor(frame.to_numpy(dtype="float64"))
    except (ValueError, OSError) as error:
        raise InputError(f"DATA={data} is no .csv file of numbers ({first_line(error)}); set DATA to one") from None
    if not isinstance(frame.index, pandas.RangeIndex):  # the first column became the rows' names
        raise InputError(f"DATA={data} has rows with more fields than the header; quote fields that hold commas, and "
                         "end no row with one")
    scale = session.c["PIXEL_SCALE"] if session.c["MODEL"] == "mlp" else 1.0
    x = x * scale
    inputs = x.to(images.dtype)
    if x.shape[1] != shape.numel() or not torch.isfinite(x).all() or not torch.isfinite(inputs).all():
        raise InputError(f"DATA={data} must have {shape.numel():,} columns of finite numbers, one for each input; it "
                         f"has {x.shape[1]:,} columns")
    if all(map(is_numeric_dtype, first.dtypes)) and first.iloc[0].tolist() != list(range(x.shape[1])):
        raise InputError(f"DATA={data} begins with a row of numbers; give it a first line with the columns' names")
    if not images.is_floating_point() and not torch.equal(inputs.double(), x):
        changed = float(x[inputs.double() != x][0])
        raise InputError(f"DATA={data} has {changed:g} in it, but the module's inputs are "
                         f"{str(images.dtype).removeprefix('torch.')}; write the numbers as in training")
    return Task(torch.zeros(len(x), dtype=torch.long), session.task.n_classes, {}, images=inputs.view(-1, *shape))


def predictions(session: Session, task: Task, sae: SAE | None, n_latents: int) -> pandas.DataFrame:
    """A row for each example: text if it is one, class, its probability, those of all classes, the strongest latents.

    A latent is given as "number:code", codes in units of the SAE's scaled activations.
    """
    names = session.task.class_names
    h, logits = outputs(session.model, task, torch.arange(len(task.y)), session.c["BATCH_SIZE"])
    p = logits.double().softmax(1)
    frame = pandas.DataFrame({"text": task.texts} if task.texts else {"row": range(1, len(task.y) + 1)})
    frame["prediction"] = [names[i] for i in p.argmax(1).tolist()]
    frame["probability"] = p.max(1).values.numpy()
    for i, name in enumerate(names):
        frame[f"p({name})"] = p[:, i].numpy()
    if sae is not None:
        values, indices = (part.cpu() for part in sae.encode(h.to(sae.mean.device)))
        order = values.argsort(1, descending=True)[:, :n_latents]
        frame["latents"] = [" ".join(f"{i}:{v:.2f}" for v, i in zip(row, latents) if v > 0) for row, latents in
                            zip(values.gather(1, order).tolist(), indices.gather(1, order).tolist())]
    return frame
