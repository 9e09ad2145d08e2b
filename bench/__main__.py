"""`python -m bench gateway|train|load|fake|report`: parses, imports, runs. Progress on stderr, JSON last on stdout."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from cluster.command import add_set, run_command
from cluster.errors import ConfigError

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit status; a user's mistake is a line on standard error and 2."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _gateway_parser(commands.add_parser("gateway", help="compare our endpoint with bare vLLM and other fronts"))
    _train_parser(commands.add_parser("train", help="compare our training loop with DeepSpeed's launcher and plain PyTorch"))
    _load_parser(commands.add_parser("load", help="one round of load; one JSON line"))
    _fake_parser(commands.add_parser("fake", help="a fake engine that speaks vLLM's protocol"))
    report = commands.add_parser("report", help="a Markdown table and a plot of a result file")
    report.add_argument("file", type=Path)
    report.add_argument(
        "--plot", type=Path, help="where the plot goes; default docs/bench-<suite>.png or docs/autoscaling.png, '-': none"
    )
    report.set_defaults(run=_report)
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    return run_command(args)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    """SIGTERM stops the servers that were started, as Ctrl-C does."""
    raise KeyboardInterrupt


def _gateway_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, nargs="?", default=Path("configs/local-cpu.yaml"), help="what `cluster up` starts")
    parser.add_argument("--quick", action="store_true", help="fewer requests per round")
    parser.add_argument("--arms", default=None, help="in order; default bare,ours,vllm-router (with --fake: ours)")
    parser.add_argument("--streams", default=None, help="default 1,8,32,128 (with --fake: 200)")
    parser.add_argument("--pairs", type=int, default=5, help="counted rounds per arm")
    parser.add_argument("--model", help="model id; default: the first that generates")
    parser.add_argument("--load", choices=("own", "vllm"), default="own", help="vllm: `vllm bench serve`")
    parser.add_argument("--api", choices=("chat", "completions"), default="chat")
    parser.add_argument("--prompt-tokens", type=int, default=96)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--port", type=int, default=27200, help="first of the loopback ports taken")
    parser.add_argument("--endpoint", type=Path, default=None, help="default run/endpoint.json")
    add_set(parser)
    parser.add_argument("--fake", action="store_true", help="a fake engine instead of the model")
    parser.add_argument("--rate", type=float, default=20.0, help="with --fake: tokens per second of each stream")
    parser.add_argument("--held", type=int, default=1000, help="with --fake: slow streams held at once; 0 for none")
    parser.add_argument("--lockstep", action="store_true", help="with --fake: tokens of all streams leave together")
    parser.set_defaults(run=_gateway)


def _train_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, nargs="?", default=Path("configs/bench-train.yaml"), help="what is trained")
    parser.add_argument("--quick", action="store_true", help="fewer steps and rounds")
    parser.add_argument("--pairs", type=int, default=None, help="rounds of each arm; default 5, with --quick 2")
    parser.add_argument("--workers", default="1,2", help="numbers of workers; the largest is what is compared")
    parser.add_argument("--steps", type=int, default=None, help="of each run; default 80, with --quick 24")
    parser.add_argument("--peak-tflops", type=float, default=None, help="of one GPU, for MFU; default by the GPU's name")
    add_set(parser)
    parser.set_defaults(run=_train)


def _load_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", required=True, help="with /v1")
    parser.add_argument("--key", help="default: TIDEPOOL_BENCH_KEY of the environment")
    parser.add_argument("--model", required=True)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--words", type=int, default=24, help="words per prompt")
    parser.add_argument("--api", choices=("chat", "completions"), default="chat")
    parser.add_argument("--ramp", type=float, default=0.0, help="seconds over which the streams start")
    parser.add_argument("--timeout", type=float, default=300.0)
    parser.add_argument("--stamps", action="store_true", help="the fake engine's send times are in the text")
    parser.add_argument("--certificate", help="file of the certificate to know an https server by")
    parser.set_defaults(run=_load)


def _fake_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=27290)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--model", default="fake")
    parser.add_argument("--rate", type=float, default=20.0, help="tokens per second of each stream; 0: as fast as it can")
    parser.add_argument("--ttft", type=float, default=0.05, help="seconds to the first token")
    parser.add_argument("--tokens", type=int, default=64, help="output tokens when a request sets no limit")
    parser.add_argument("--stamps", action="store_true", help="each token is its send time")
    parser.add_argument("--lockstep", action="store_true", help="tokens of all streams leave together")
    parser.set_defaults(run=_fake)


def _gateway(args: argparse.Namespace) -> int:
    from bench import fake_suite, suites
    from bench.arms import Places
    from cluster.config import load

    # Programs started here must find our packages wherever this one was called from.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(RESULTS.parent.parent), os.environ.get("PYTHONPATH")]))
    run_dir = Path(load(args.config, args.set).run_dir)
    endpoint = args.endpoint or run_dir / "endpoint.json"
    bench_dir = (run_dir / "bench").absolute()
    bench_dir.mkdir(parents=True, exist_ok=True)
    places = Places(args.config, endpoint, bench_dir, args.port, tuple(args.set), args.model)
    arms = tuple(name for name in (args.arms or ("ours" if args.fake else "bare,ours,vllm-router")).split(",") if name)
    if args.pairs < 1 or not arms:
        raise ConfigError("--pairs must be at least 1 and --arms must name an arm")
    streams = _counts(args.streams or ("200" if args.fake else "1,8,32,128"))
    if args.fake:
        fake = fake_suite.FakeSuitePlan(
            arms,
            args.pairs,
            places,
            streams[0],
            args.rate,
            max_tokens=args.max_tokens,
            held=args.held,
            lockstep=args.lockstep,
            seed=args.seed,
        )
        document = fake_suite.run(fake, _say)
    else:
        plan = suites.SuitePlan(
            arms, streams, args.pairs, places, args.quick, args.prompt_tokens, args.max_tokens, args.api, args.load, args.seed
        )
        document = suites.run(plan, _say)
    _finish(document)
    return 0


def _train(args: argparse.Namespace) -> int:
    from bench.train_suite import TrainSuitePlan, run

    if min(1 if args.pairs is None else args.pairs, 2 if args.steps is None else args.steps - 1) < 1:
        raise ConfigError("--pairs must be at least 1, --steps at least 2")
    workers = _counts(args.workers, "--workers")
    plan = TrainSuitePlan(args.config, tuple(args.set), args.pairs, workers, args.quick, args.steps, args.peak_tflops)
    _finish(run(plan, _say))
    return 0


def _counts(text: str, option: str = "--streams") -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{option} {text}: write whole numbers with commas") from error
    if not counts or min(counts) < 1:
        raise ConfigError(f"{option} {text}: each must be at least 1")
    return counts


def _finish(document: dict[str, Any]) -> None:
    """Keep the raw file, show the targets, print the document."""
    from bench import report

    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{document['date'][:19].replace(':', '')}-{document['suite']}.json"
    file.write_text(json.dumps(document, indent=1) + "\n")
    _say("\n" + report.markdown(document))
    _say(f"raw file: {file}")
    print(json.dumps(document))


def _load(args: argparse.Namespace) -> int:
    from bench.load import LoadPlan, run

    key = args.key if args.key is not None else os.environ.get("TIDEPOOL_BENCH_KEY", "")
    plan = LoadPlan(
        args.url.rstrip("/"), key, args.model, args.streams, args.requests, args.max_tokens, args.seed, args.words, args.api,
        args.ramp, args.timeout, args.stamps, args.certificate,
    )  # fmt: skip
    if min(plan.streams, plan.requests, plan.max_tokens) < 1:
        raise ConfigError("--streams, --requests and --max-tokens must be at least 1")
    print(json.dumps(run(plan)))
    return 0


def _fake(args: argparse.Namespace) -> int:
    from bench.fake import FakePlan, serve

    serve(FakePlan(args.model, args.rate, args.ttft, args.tokens, args.stamps, args.lockstep), args.port, args.host)
    return 0


def _report(args: argparse.Namespace) -> int:
    from bench import report

    return report.write(args.file, args.plot)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
