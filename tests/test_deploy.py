"""The files of deploy/ against the launchers that read them: accelerate's own classes, torchrun, bash."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from llmbot.core.errors import MissingExtraError
from llmbot.training.methods import asked_strategy, check_strategy, strategy_arguments

DEPLOY = Path(__file__).parents[1] / "deploy"
STRATEGIES = {"ddp": "ddp", "fsdp2": "fsdp", "zero2": "zero2", "zero3": "zero3", "two_machines": "fsdp"}


def launcher_environment(path: Path) -> dict[str, str]:
    "What `accelerate launch --config_file PATH` puts into the environment of each process."
    parser = launch_command_parser()
    args, defaults, _ = _validate_launch_command(parser.parse_args(["--config_file", str(path), "-m", "llmbot.app.cli"]))
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)


def test_every_file_is_tested() -> None:
    assert {path.stem for path in (DEPLOY / "accelerate").glob("*")} == STRATEGIES.keys()


@pytest.mark.parametrize("name", STRATEGIES)
def test_accelerate_reads_it_as_meant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    "Accelerate takes every key, and asks our trainer for the strategy that the file is about."
    path = DEPLOY / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert config.num_machines == (2 if name == "two_machines" else 1)
    assert config.mixed_precision == "no", "the recipe decides"
    known = {action.dest for action in launch_command_parser()._actions}
    assert {*config.fsdp_config, *config.deepspeed_config} <= known
    for variable in [v for v in os.environ if v.startswith(("ACCELERATE_", "FSDP_"))]:
        monkeypatch.delenv(variable)
    for variable, value in launcher_environment(path).items():
        if variable.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.setenv(variable, value)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(config.num_processes))
    assert asked_strategy("auto") == STRATEGIES[name]
    if STRATEGIES[name] == "fsdp":
        plugin = FullyShardedDataParallelPlugin()
        assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
        assert "SHARDED" in str(plugin.state_dict_type)
        assert not plugin.cpu_ram_efficient_loading


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_deepspeed_takes_the_configuration(strategy: str) -> None:
    "DeepSpeed's own reader of configurations, where it is installed; without it, the extra is named."
    if importlib.util.find_spec("deepspeed") is None:
        with pytest.raises(MissingExtraError, match=r"llmbot\[distributed\]"):
            check_strategy(strategy, "cuda")
        pytest.skip("DeepSpeed is not installed: pip install 'llmbot[distributed]' to check its configuration too")
    from deepspeed.runtime.config import DeepSpeedConfig

    asked = strategy_arguments(strategy, checkpointing=False)["deepspeed"]
    sizes = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0}
    read = DeepSpeedConfig(asked | sizes | {"bf16": {"enabled": True}, "fp16": {"enabled": False}})
    assert read.zero_config.stage == int(strategy[-1])
    assert read.zero_config.gather_16bit_weights_on_model_save == (strategy == "zero3")


def test_torchrun_script_starts_the_command() -> None:
    "The script itself, with one process on this machine."
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where torchrun is, also where no environment is active
    environment = os.environ | {"HEAD": "127.0.0.1", "PROCESSES": "1", "PORT": "0", "COLUMNS": "100", "PATH": path}
    done = subprocess.run([DEPLOY / "torchrun.sh", "--help"], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--nproc" in done.stdout
    without = {name: value for name, value in environment.items() if name != "HEAD"}
    assert "set HEAD" in subprocess.run([DEPLOY / "torchrun.sh"], env=without, capture_output=True, text=True).stderr


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sbatch"])
def test_bash_parses_it(script: str) -> None:
    subprocess.run(["bash", "-n", DEPLOY / script], check=True)
    assert os.access(DEPLOY / script, os.X_OK)
