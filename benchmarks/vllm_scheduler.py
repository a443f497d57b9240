"""What a step of vLLM costs its engine's process apart from the model: its own scheduler and sftkit's, on the same steps, without a card.

    python benchmarks/vllm_scheduler.py TOKENIZER [--sequences 1024] [--steps 150] [--blocks 9] [--asked 1.0] [--profile]

The schedulers are the real ones, for engines that schedule a step ahead of the card; the model is a row of numbers: every sequence
gets its next token at once. A step is to schedule, to take the results in, to pack what goes to the process that feeds the engine
(msgpack, as vLLM sends it), to unpack it there and to take it in. Milliseconds of each, the mean over the steps that are full. Both
schedulers have to give the same answers, but for one that once has a logit that is not a number, which sftkit's ends as failed.
--asked is the share of the sequences that are asked for with their log-probabilities.
"""

import argparse
import cProfile
import os
import pstats
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from teachers import random_teacher

BLOCK = 16
BROKEN = "3"  # the sequence that has a logit that is not a number


def make_scheduler(kind: type, model: str, sequences: int, blocks: int) -> Any:
    """Return a scheduler of a kind with a cache of so many blocks for each sequence."""
    import torch
    from vllm import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    arguments = EngineArgs(model=model, max_model_len=2048, max_num_seqs=sequences, max_num_batched_tokens=16_384, enforce_eager=True)
    config = arguments.create_engine_config(UsageContext.LLM_CLASS)
    config.scheduler_config.async_scheduling = True  # not done on a CPU, where the model would be waited for
    config.cache_config.block_size = BLOCK
    config.cache_config.num_gpu_blocks = blocks * sequences
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32)
    cache = KVCacheConfig(num_blocks=blocks * sequences, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    return kind(
        vllm_config=config,
        kv_cache_config=cache,
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        hash_block_size=BLOCK,
        log_stats=False,
    )


def measure(
    kind: type, model: str, sequences: int, steps: int, blocks: int, share: float, profile: cProfile.Profile | None
) -> tuple[dict[str, float], dict[str, Any]]:
    """Return milliseconds of each part of a step, and the answers by their names."""
    import torch
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
    from vllm.v1.engine.output_processor import OutputProcessor
    from vllm.v1.outputs import LogprobsTensors, ModelRunnerOutput
    from vllm.v1.request import Request
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    init_none_hash(sha256)
    scheduler, hasher = make_scheduler(kind, model, sequences, blocks), get_request_block_hasher(BLOCK, sha256)
    receiver, encoder, decoder = OutputProcessor(None, log_stats=False), MsgpackEncoder(), MsgpackDecoder(EngineCoreOutputs)
    draw = np.random.default_rng(0)
    wanted = {}
    for number in range(2 * sequences):
        ids = [5] * 40 + draw.integers(10, 1000, size=int(draw.integers(10, 90))).tolist()
        params = SamplingParams(
            temperature=0.8, max_tokens=int(draw.integers(steps // 3, steps)), logprobs=0 if draw.random() < share else None,
            detokenize=False, flat_logprobs=True, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        asked = EngineCoreRequest(
            request_id=str(number), prompt_token_ids=ids, mm_features=None, sampling_params=params, pooling_params=None, arrival_time=0.0,
            lora_request=None, cache_salt=None, data_parallel_rank=None, external_req_id=str(number),
        )  # fmt: skip
        wanted[str(number)] = params.max_tokens
        receiver.add_request(asked, None, None, 0)
        scheduler.add_request(Request.from_engine_core_request(asked, hasher))
    times: dict[str, list[float]] = defaultdict(list)
    answers: dict[str, Any] = {}
    before = None
    while len(answers) < len(wanted):
        passed: dict[str, float] = defaultdict(float)

        def clock(name: str, since: float, passed: dict[str, float] = passed) -> None:
            passed[name] += 1e3 * (time.perf_counter() - since)

        if profile is not None:
            profile.enable()
        start = time.perf_counter()
        output = scheduler.schedule()
        clock("schedule", start)
        if profile is not None:
            profile.disable()
        if before is not None:
            names = list(before.num_scheduled_tokens)
            tokens = [
                [(int(name) + scheduler.requests[name].num_output_tokens) % 1000] if name in scheduler.requests else [7] for name in names
            ]
            rows = np.array([[-0.5 - int(name) % 7] for name in names], dtype=np.float32)
            logprobs = LogprobsTensors(
                torch.tensor(tokens, dtype=torch.int32), torch.from_numpy(rows), torch.zeros(len(names), dtype=torch.int64)
            ).tolists()
            nans = dict.fromkeys(names, 0)
            if BROKEN in nans and BROKEN in scheduler.requests:
                nans[BROKEN] = int(scheduler.requests[BROKEN].num_output_tokens == 4)
            made = ModelRunnerOutput(
                req_ids=names, req_id_to_index={name: place for place, name in enumerate(names)}, sampled_token_ids=tokens,
                logprobs=logprobs if share else None, prompt_logprobs_dict={}, pooler_output=[],
                num_nans_in_logits=nans,
            )  # fmt: skip
            if profile is not None:
                profile.enable()
            start = time.perf_counter()
            found = scheduler.update_from_output(before, made)
            clock("take results in", start)
            if profile is not None:
                profile.disable()
            for outputs in found.values():
                start = time.perf_counter()
                packed = encoder.encode(outputs)
                clock("pack", start)
                start = time.perf_counter()
                unpacked = decoder.decode(packed)
                clock("unpack", start)
                start = time.perf_counter()
                done = receiver.process_outputs(unpacked.outputs).request_outputs
                clock("take answers in", start)
                for each in done:
                    answer = each.outputs[0]
                    answers[each.request_id] = list(answer.token_ids), answer.cumulative_logprob, answer.finish_reason
            if len(names) == sequences:  # a full step
                for name in ("schedule", "take results in", "pack", "unpack", "take answers in"):
                    times[name].append(passed[name])
        before = output if output.num_scheduled_tokens else None
        assert before is not None or len(answers) == len(wanted) or scheduler.has_requests()
    assert {name: len(tokens) for name, (tokens, *_) in answers.items()} == wanted
    return {name: statistics.mean(each) for name, each in times.items()}, answers


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tokenizer")
    parser.add_argument("--sequences", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--blocks", type=int, default=128, help="of the cache for each sequence; 9 are too few: some have to wait")
    parser.add_argument("--asked", type=float, default=1.0)
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from sftkit.core.engines.vllm_scheduler import GatheringAsyncScheduler
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = random_teacher("tiny", Path(given.tokenizer), Path(scratch) / "model")
        for name, kind in {"vLLM's": AsyncScheduler, "sftkit's": GatheringAsyncScheduler}.items():
            profile = cProfile.Profile() if given.profile else None
            times, answers = measure(kind, model, given.sequences, given.steps, given.blocks, given.asked, profile)
            found[name] = answers
            parts = ", ".join(f"{part} {value:.2f}" for part, value in times.items())
            print(f"{name:9} {sum(times.values()):7.2f} ms a step of {given.sequences:,} sequences: {parts}", flush=True)
            if profile is not None:
                pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    own, ours = found.values()
    assert own.keys() == ours.keys()
    for name, (tokens, logprob, _) in own.items():
        assert ours[name][0] == tokens
        assert ours[name][2] == ("error" if name == BROKEN else "length")
        assert ours[name][1] is None if logprob is None else abs(ours[name][1] - logprob) < 1e-3
    print("the same answers")


if __name__ == "__main__":
    main()
