"""The recorder of ranges: what it counts, in which steps and layers, and that it leaves nothing behind."""

import threading

import pytest
import torch
from tiny_sigma import tiny_model, tokens
from torch.nn.modules import module as torch_module
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from diffqkv import Cache, profiling

RANGES = {"kv_cache", "attention", "augmented_q", "rest"}


@pytest.fixture(params=[None, "packed", "int8"])
def model(request):
    model = tiny_model((8, 2, 4), hidden_size=64, q_aug_dim=64, intermediate_size=64)
    return model if request.param is None else model.fuse_for_inference(request.param)


@torch.no_grad()
def test_generate_is_recorded_by_steps_and_layers(model):
    with profiling.record() as recording:
        model.generate(tokens(2, 5), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    steps = recording.steps
    assert [(step.batch, step.tokens) for step in steps] == [(2, 5), (2, 1), (2, 1), (2, 1)]
    for step in steps:
        assert step.model == "SigmaForCausalLM"
        assert [set(layer) for layer in step.layers] == [RANGES] * model.config.num_hidden_layers
        assert all(seconds > 0 for layer in step.layers for seconds in layer.values())
        parts = [step.total(name) for name in RANGES]
        assert sum(parts) == pytest.approx(step.seconds)
        assert min(parts) > 0
        assert sum(sum(layer.values()) for layer in step.layers) < step.seconds


@torch.no_grad()
def test_results_do_not_depend_on_being_recorded(model):
    ids = tokens(1, 6)
    want = model(ids).logits
    with profiling.record():
        assert torch.equal(model(ids).logits, want)


@torch.no_grad()
def test_a_packed_step_stays_one_without_modules():
    model = tiny_model((8, 2, 4), hidden_size=64, q_aug_dim=64, intermediate_size=64).fuse_for_inference("packed")
    cache = Cache(model.config)
    model(tokens(1, 5), cache=cache)
    with profiling.record():
        calls = []
        handle = model.model.layers[0].mlp.register_forward_hook(lambda *x: calls.append(x))
        model(tokens(1, 1), cache=cache)  # the hook is the user's: the layers run
        handle.remove()
        assert len(calls) == 1
        from diffqkv.models import decode_step

        before, seen = decode_step.decode_step, []
        try:
            decode_step.decode_step = lambda *x: seen.append(1) or before(*x)
            model(tokens(1, 1), cache=cache)
        finally:
            decode_step.decode_step = before
        assert seen == [1]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_stock_attention_has_the_same_ranges(attention):
    model = tiny_model()
    model.set_attn_implementation(attention)
    with profiling.record() as recording:
        model(tokens(1, 5), cache=DynamicCache(config=model.config))
    assert set(recording.steps[0].layers[0]) == RANGES


@torch.no_grad()
def test_other_models_have_the_range_of_attention():
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
        attn_implementation="diffqkv",
    )  # fmt: skip
    llama = LlamaForCausalLM(config).eval()
    with profiling.record() as recording:
        llama(tokens(1, 5) % 64)
    (step,) = recording.steps
    assert (step.model, step.batch, step.tokens) == ("LlamaForCausalLM", 1, 5)
    assert [set(layer) for layer in step.layers] == [{"attention"}] * 2
    assert 0 < step.total("attention") < step.seconds
    assert step.total("kv_cache") == step.total("augmented_q") == 0


@torch.no_grad()
def test_forms_of_a_recording():
    model = tiny_model()
    with profiling.record() as recording:
        model(tokens(2, 5))
        model(inputs_embeds=torch.randn(1, 3, model.config.hidden_size))
    first, second = recording.to_dict()["steps"]
    assert (first["batch"], first["tokens"], second["batch"], second["tokens"]) == (2, 5, 1, 3)
    ranges = ("kv_cache", "attention", "augmented_q", "rest")
    assert sum(first[name] for name in ranges) == pytest.approx(first["seconds"])
    frame = recording.to_pandas()
    assert list(frame.columns) == ["step", "model", "batch", "tokens", "layer", "range", "seconds"]
    for i, step in enumerate((first, second)):
        mine = frame[frame.step == i]
        assert mine.seconds.sum() == pytest.approx(step["seconds"])
        assert mine[mine.range == "attention"].seconds.sum() == pytest.approx(step["attention"])
        assert set(mine.layer) == {-1, 0, 1}
    header, *lines = recording.table().splitlines()
    assert header.split() == [
        *("model", "batch", "tokens", "steps", "kv_cache,", "ms", "attention,", "ms", "augmented_q,", "ms"),
        *("rest,", "ms", "total,", "ms"),
    ]
    assert [line.split()[:4] for line in lines] == [
        ["SigmaForCausalLM", "2", "5", "1"],
        ["SigmaForCausalLM", "1", "3", "1"],
    ]


def test_to_pandas_without_pandas(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with profiling.record() as recording:
        pass
    assert recording.steps == [] and recording.to_dict() == {"steps": []}
    with pytest.raises(ImportError, match="pip install pandas"):
        recording.to_pandas()


@torch.no_grad()
def test_nothing_is_left_behind():
    model, ids = tiny_model(), tokens(1, 5)
    with pytest.raises(ValueError, match="mine"), profiling.record() as recording:
        raise ValueError("mine")
    assert not torch_module._has_any_global_hook()
    assert profiling._recording is None
    model(ids)
    assert recording.steps == []


@torch.no_grad()
def test_a_step_that_fails_is_not_one_and_the_next_is():
    model, ids = tiny_model(), tokens(1, 5)
    with profiling.record() as recording:
        with pytest.raises(ValueError, match="input_ids"):
            model()
        with pytest.raises(ZeroDivisionError):
            handle = model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda *x: 1 / 0)
            model(ids)
        handle.remove()
        model(ids)
    assert len(recording.steps) == 1
    assert set(recording.steps[0].layers[1]) == RANGES


@torch.no_grad()
def test_a_recording_within_another_sees_alone():
    model, ids = tiny_model(), tokens(1, 5)
    with profiling.record() as outer:
        model(ids)
        with profiling.record() as inner:
            model(ids)
            model(ids)
        model(ids)
    assert (len(outer.steps), len(inner.steps)) == (2, 2)


def test_threads_have_steps_of_their_own():
    model, ids = tiny_model(), tokens(1, 5)

    @torch.no_grad()
    def work():
        for _ in range(5):
            model(ids)

    with profiling.record() as recording:
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(recording.steps) == 15
    assert all([set(layer) for layer in step.layers] == [RANGES] * 2 for step in recording.steps)


def test_training_records_the_forward_pass():
    model, ids = tiny_model().train(), tokens(1, 5)
    with profiling.record() as recording:
        model(ids, labels=ids).loss.backward()
    assert len(recording.steps) == 1


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def with_a_compiled_layer(model):
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    return model


COMPILED = [lambda model: torch.compile(model, backend="eager"), compiled_in_place, with_a_compiled_layer]


@pytest.mark.filterwarnings("ignore:.*global hooks on modules", "ignore:Dynamo does not know")
@pytest.mark.parametrize("compiled", COMPILED)
def test_compiled_models_are_refused(compiled):
    model = compiled(tiny_model())
    message = "record: compiled code has no ranges"
    with torch.no_grad(), profiling.record() as recording, pytest.raises(NotImplementedError, match=message):
        model(tokens(1, 5))
    assert recording.steps == []


@torch.no_grad()
def test_an_interrupted_step_is_none_and_the_next_is_whole():
    """A KeyboardInterrupt, for which torch calls no hook, in this recording or in an earlier one."""
    model, ids = tiny_model(), tokens(1, 5)

    def interrupted():
        handle = model.model.layers[1].mlp.register_forward_hook(lambda *x: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            model(ids)
        handle.remove()

    with profiling.record() as recording:
        interrupted()
        model(ids)
    (step,) = recording.steps
    assert sum(sum(layer.values()) for layer in step.layers) < step.seconds
    with profiling.record():
        interrupted()
    with profiling.record() as recording:
        model.model(ids)  # another module than the one that was interrupted
    assert [step.model for step in recording.steps] == ["SigmaModel"]


@torch.no_grad()
def test_a_profile_alone_records_no_event_of_a_gpu(monkeypatch):
    monkeypatch.setattr(profiling, "_now", lambda device: pytest.fail("nobody asked for the time"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        tiny_model()(tokens(1, 5))
    assert "augmented_q" in {event.key for event in profile.key_averages()}


@torch.no_grad()
def test_profiles_have_the_ranges_of_a_packed_step_too(model):
    cache = Cache(model.config)
    model(tokens(1, 5), cache=cache)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(tokens(1, 1), cache=cache)
    counts = {event.key: event.count for event in profile.key_averages()}
    names = (*profiling.RANGES, profiling.LAYER)
    assert [counts[name] for name in names] == [model.config.num_hidden_layers] * len(names)


class FakeEvent:
    """An event of a GPU: its time is that of a counter, known once it was waited for."""

    clock = 0

    def __init__(self, enable_timing):
        assert enable_timing
        self.waited = False

    def record(self, stream):
        FakeEvent.clock += 1
        self.at = FakeEvent.clock

    def synchronize(self):
        self.waited = True

    def elapsed_time(self, end):
        assert end.waited
        return float(end.at - self.at)


@pytest.fixture
def gpu(monkeypatch):
    """Moments of a pretended GPU, in place of those of the CPU where the models are."""
    real = profiling._now
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(profiling, "_now", lambda device: real(torch.device("cuda")))


@torch.no_grad()
def test_on_a_gpu_events_are_recorded_and_waited_for_when_steps_are_read(gpu):
    model = tiny_model()
    with profiling.record() as recording:
        model(tokens(1, 5))
        model(tokens(1, 1))
        assert len(recording._pending) == 2
    first, second = recording.steps
    assert not recording._pending
    # Each range takes one tick; a layer has three and their ends, and its own.
    assert first.layers == second.layers == [{n: 0.001 for n in profiling.RANGES} | {"rest": 0.004}] * 2
    assert first.seconds == pytest.approx(0.017)


@torch.no_grad()
def test_many_events_of_a_gpu_are_waited_for_meanwhile(gpu, monkeypatch):
    monkeypatch.setattr(profiling, "_MOST_PENDING", 10)
    model = tiny_model()
    with profiling.record() as recording:
        for _ in range(5):
            model(tokens(1, 1))
            assert sum(len(step.ranges) for step in recording._pending) <= 10
    assert len(recording.steps) == 5
