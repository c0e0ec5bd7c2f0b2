"""The models inside what others have built: copies, meta tensors, export, DDP, `transformers`."""

import copy
import pickle
from collections import OrderedDict

import pytest
import tokenizers
import torch
from torch import distributed, multiprocessing
from torch.export import Dim
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from gpt1_kernels import GPT1LMHeadModel
from tests.cases import DEVICE
from tests.models import V, config, randomised, tokens, with_dropout

RANKS, ROWS, T = 2, 2, 8


def through_pytree(output):
    return pytree.tree_unflatten(*pytree.tree_flatten(output))


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o)), through_pytree],
    ids=["copy", "deepcopy", "pickle", "pytree"],
)
def test_an_output_can_be_copied(copied):
    with torch.no_grad():
        output = randomised(GPT1LMHeadModel(config()))(tokens(1, T), labels=tokens(1, T))
    other = copied(output)
    assert type(other) is type(output)
    assert other.keys() == output.keys() == {"loss"}
    assert other.loss == output.loss
    assert other.logits is None
    assert type(output)(dict(output)).loss is output.loss
    with pytest.raises(AttributeError, match="ModelOutput has no 'losses'; it has"):
        _ = other.losses


@pytest.mark.parametrize(
    "rebuilt",
    [lambda o: type(o)(dict(o)), lambda o: put_into(type(o)(), o)],
    ids=["accelerate", "FSDP1"],
)
def test_an_output_is_rebuilt_from_what_it_holds(rebuilt):
    output = randomised(GPT1LMHeadModel(config()))(tokens(1, T), labels=tokens(1, T))
    assert isinstance(output, OrderedDict)  # FSDP1 makes any other dictionary a plain one
    other = rebuilt(output)
    assert other.loss is output.loss
    assert other.logits is None


def put_into(empty, output):
    for key, value in output.items():
        empty[key] = value
    return empty


@pytest.mark.filterwarnings("ignore:.* an autograd kernel was not registered")
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    model = randomised(GPT1LMHeadModel(config())).eval()
    lengths = {0: Dim("B"), 1: Dim("T", min=3, max=32)}
    exported = torch.export.export(
        model, (tokens(2, T),), {"labels": tokens(2, T)}, strict=strict,
        dynamic_shapes={"input_ids": lengths, "labels": lengths},
    ).module()  # fmt: skip
    ids = tokens(3, T + 1)
    actual, expected = exported(ids, labels=ids), model(ids, labels=ids)
    torch.testing.assert_close(actual.logits, expected.logits)
    torch.testing.assert_close(actual.loss, expected.loss)
    refused = "does not require grad" if strict else "an exported program has no backward"
    with pytest.raises(RuntimeError, match=refused):
        actual.loss.backward()


def test_shapes_on_the_meta_device():
    with torch.device("meta"):
        model, ids = GPT1LMHeadModel(with_dropout()), torch.zeros(1, T, dtype=torch.int64)
    output = model(ids, labels=ids, return_logits=True)
    output.loss.backward()
    assert output.logits.shape == (1, T, V)


@pytest.mark.parametrize("assign", [False, True])
def test_a_model_from_the_meta_device_has_its_own_dropout(assign):
    model = GPT1LMHeadModel(with_dropout()).to(DEVICE)
    with torch.device("meta"):
        empty = GPT1LMHeadModel(with_dropout())
    if not assign:
        empty.to_empty(device=DEVICE)
    empty.load_state_dict(model.state_dict(), assign=assign)
    stream, expected = empty.dropout_stream, model.dropout_stream
    assert torch.equal(stream.site_words, expected.site_words)
    assert stream.step == 0
    stream.set_key(int(expected.key))
    ids = tokens(1, T)
    assert empty.train()(ids, labels=ids).loss == model.train()(ids, labels=ids).loss


def test_emptying_the_weights_leaves_the_dropout_as_it_was():
    """`init_empty_weights` of accelerate puts the weights alone on the meta device."""
    stream = GPT1LMHeadModel(with_dropout()).to(DEVICE).dropout_stream
    expected = stream.seeds(stream.step)
    stream.to_empty(device=DEVICE)
    assert torch.equal(stream.seeds(stream.step), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_model_draws_other_bits_only_after_an_error(use_reentrant):
    model, ids = randomised(GPT1LMHeadModel(with_dropout())), tokens(1, T)
    anchor = torch.zeros((), device=DEVICE, requires_grad=True)  # reentrant checkpoints need one

    def loss(anchor, seeds=None):
        return model(ids, labels=ids, dropout_seeds=seeds).loss + anchor

    with pytest.raises(RuntimeError, match="dropout_stream: a forward in a backward"):
        checkpoint(loss, anchor, use_reentrant=use_reentrant).backward()
    seeds, gradients = model.dropout_stream.advance(), []
    for forward in (loss, lambda *args: checkpoint(loss, *args, use_reentrant=use_reentrant)):
        model.zero_grad()
        forward(anchor, seeds).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_what_was_generated_can_be_trained_on():
    model = randomised(GPT1LMHeadModel(config()))
    ids = model.generate(tokens(1, T), max_new_tokens=3)
    model(ids, labels=ids).loss.backward()


def distributed_gradients(rank: int, init_file: str, out: str) -> None:
    """On one of RANKS processes: the gradients of its share, averaged by DDP over the ranks."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{init_file}", rank=rank, world_size=RANKS
    )
    ids = shares()[rank]
    for static_graph in (False, True):
        model = DistributedDataParallel(model_of_ranks().cpu(), static_graph=static_graph)
        for _ in range(2):  # a static graph is known after the first
            model.zero_grad()
            seeds = model.module.dropout_stream.seeds(0)
            output = model(ids, labels=ids, dropout_seeds=seeds, row_offset=rank * ids.numel())
            output.loss.backward()
        if rank == 0:
            torch.save([p.grad for p in model.parameters()], f"{out}-{static_graph}")
    distributed.destroy_process_group()


def model_of_ranks():
    torch.manual_seed(0)
    return randomised(GPT1LMHeadModel(with_dropout()))


def shares():
    return tokens(RANKS * ROWS, T).cpu().chunk(RANKS)


@pytest.mark.skipif(not distributed.is_available(), reason="this PyTorch is not distributed")
def test_ddp_has_the_gradients_of_the_whole_batch(tmp_path):
    whole, ids = model_of_ranks().cpu(), torch.cat(shares())
    whole(ids, labels=ids, dropout_seeds=whole.dropout_stream.seeds(0)).loss.backward()
    arguments = str(tmp_path / "init"), str(tmp_path / "gradients")
    multiprocessing.spawn(distributed_gradients, arguments, nprocs=RANKS)
    for static_graph in (False, True):
        gradients = torch.load(tmp_path / f"gradients-{static_graph}")
        for gradient, parameter in zip(gradients, whole.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.fixture
def trainer(tmp_path):
    """Makes a `transformers.Trainer`."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def make(model, *, processing_class=None, **options):
        examples = [{"input_ids": row, "labels": row} for row in torch.arange(4 * T).view(4, T) % V]
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=1, report_to=[],
            use_cpu=DEVICE == "cpu", disable_tqdm=True, **options,
        )  # fmt: skip
        return transformers.Trainer(
            model, arguments, train_dataset=examples, eval_dataset=examples,
            processing_class=processing_class,
        )  # fmt: skip

    return make


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2},
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"processing_class": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_the_trainer_of_transformers(trainer, options):
    if "processing_class" in options:
        transformers = pytest.importorskip("transformers")
        letters = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<unk>": 1}, "<unk>"))
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="a")
        options = {"processing_class": tokenizer}
    model = GPT1LMHeadModel(with_dropout())
    before = [p.clone() for p in model.parameters()]
    training = trainer(model, save_steps=2, **options)
    assert training.train().training_loss > 0
    assert training.evaluate()["eval_loss"] > 0
    assert not any(map(torch.equal, before, [p.cpu() for p in model.parameters()]))


def test_the_trainer_shifts_the_labels_that_it_smooths(trainer, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = randomised(GPT1LMHeadModel(config())).eval()
    ours.save_pretrained(tmp_path / "model")
    theirs = transformers.OpenAIGPTLMHeadModel.from_pretrained(tmp_path / "model").to(DEVICE).eval()
    losses = []
    for model in (ours, theirs):
        inputs = {"input_ids": tokens(2, T), "labels": tokens(2, T)}
        losses.append(trainer(model, label_smoothing_factor=0.1).compute_loss(model, inputs))
    torch.testing.assert_close(*losses)
