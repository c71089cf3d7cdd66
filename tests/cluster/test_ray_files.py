"""What the files of ray/ promise, read as Ray and Kubernetes would; no cluster is started."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.runtime_env.packaging import _get_excludes
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "ray"
LAUNCHED = ["cluster-aws.yaml", "cluster-gcp.yaml"]


def read(name: str) -> dict[str, Any]:
    """A file of one document."""
    return yaml.safe_load((FOLDER / name).read_text())


def kubernetes(kind: str) -> dict[str, Any]:
    """The one document of that kind in kuberay.yaml."""
    documents = yaml.safe_load_all((FOLDER / "kuberay.yaml").read_text())
    [document] = [document for document in documents if document["kind"] == kind]
    return document


def pods() -> dict[str, dict[str, Any]]:
    """The pods of the Kubernetes cluster, by group."""
    spec = kubernetes("RayCluster")["spec"]
    groups = {"head": spec["headGroupSpec"]}
    groups |= {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    return {name: group["template"]["spec"] for name, group in groups.items()}


def containers() -> Iterator[dict[str, Any]]:
    """Ray's container of each pod."""
    for pod in pods().values():
        yield pod["containers"][0]


def ray_version() -> str:
    """The version that constraints.txt pins."""
    [version] = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return version


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_up_accepts_the_cluster_files(name: str) -> None:
    config = prepare_config(copy.deepcopy(read(name)))
    validate_config(config)
    assert config["provider"]["type"] in name
    for kind in read(name):
        assert kind in config


@pytest.mark.parametrize("name", LAUNCHED)
def test_what_a_user_replaces_is_listed_at_the_top(name: str) -> None:
    text = (FOLDER / name).read_text()
    head, body = text.split("\ncluster_name:", 1)
    assert "# Replace:" in head
    examples = re.findall(r"registry\.example\S+|\b(?:ami|fs|my)-\w+|10\.0\.0\.2:\S+", body)
    assert len(set(examples)) >= 3
    for example in examples:
        assert example in head


@pytest.mark.parametrize("name", LAUNCHED)
def test_the_heads_take_no_ranks(name: str) -> None:
    config = read(name)
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert "guestAccelerators" not in head["node_config"]
    start = " ".join(config["head_start_ray_commands"])
    assert "--num-cpus=0 " in start
    assert "--num-gpus=0 " in start


def test_the_head_on_kubernetes_takes_no_ranks() -> None:
    head = kubernetes("RayCluster")["spec"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert head["rayStartParams"]["num-gpus"] == "0"
    [container] = head["template"]["spec"]["containers"]
    assert "nvidia.com/gpu" not in container["resources"]["limits"]


@pytest.mark.parametrize("name", LAUNCHED)
def test_heads_are_kept_and_gpu_nodes_are_spot(name: str) -> None:
    config = read(name)
    head = config["available_node_types"].pop(config["head_node_type"])
    [gpu] = config["available_node_types"].values()
    assert gpu["resources"]["GPU"] > 0
    assert 0 <= gpu["min_workers"] <= gpu["max_workers"] <= config["max_workers"]
    for node, spot in ((head["node_config"], False), (gpu["node_config"], True)):
        market = node.get("InstanceMarketOptions", {}).get("MarketType")
        preemptible = {"preemptible": True} in node.get("scheduling", [])
        assert (market == "spot" or preemptible) is spot


def test_workers_on_kubernetes_have_gpus_and_come_on_demand() -> None:
    spec = kubernetes("RayCluster")["spec"]
    assert spec["enableInTreeAutoscaling"] is True
    [group] = spec["workerGroupSpecs"]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    resources = group["template"]["spec"]["containers"][0]["resources"]
    assert resources["requests"] == resources["limits"]
    assert int(resources["limits"]["nvidia.com/gpu"]) > 0


@pytest.mark.parametrize("name", LAUNCHED)
def test_the_dashboard_listens_on_loopback(name: str) -> None:
    hosts = re.findall(r"--dashboard-host=(\S+)", " ".join(read(name)["head_start_ray_commands"]))
    assert hosts == ["127.0.0.1"]


def test_kubernetes_exposes_no_port_to_the_outside() -> None:
    assert kubernetes("RayCluster")["spec"]["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert "hostPort" not in (FOLDER / "kuberay.yaml").read_text()


@pytest.mark.parametrize("name", LAUNCHED)
def test_all_nodes_ask_for_the_token_and_have_it(name: str) -> None:
    config = read(name)
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}


def test_kubernetes_asks_for_a_token_that_no_file_holds() -> None:
    assert kubernetes("RayCluster")["spec"]["authOptions"] == {"mode": "token"}
    for path in FOLDER.iterdir():
        assert not re.search(r"RAY_AUTH_TOKEN[=:] *\w", path.read_text()), path.name


@pytest.mark.parametrize("name", LAUNCHED)
def test_every_node_mounts_the_shared_folder(name: str) -> None:
    config = read(name)
    assert "--volume /shared:/shared" in config["docker"]["run_options"]
    # Commands of one node type would replace those of all.
    for node in config["available_node_types"].values():
        assert "initialization_commands" not in node
    [mount] = [line for line in config["initialization_commands"] if "sudo mount " in line]
    assert mount.startswith("mountpoint -q /shared || ")
    assert mount.endswith(" /shared")
    assert " -t nfs" in mount


def test_every_pod_mounts_the_shared_folder() -> None:
    claim = kubernetes("PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for name, pod in pods().items():
        [volume] = [volume for volume in pod["volumes"] if volume["name"] == "shared"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"], name
        for container in pod["containers"]:
            assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"], name


def test_a_lost_pod_is_replaced_and_not_restarted() -> None:
    assert [pod["restartPolicy"] for pod in pods().values()] == ["Never", "Never"]


def test_runs_of_a_job_are_in_the_shared_folder() -> None:
    runs = read("runtime_env.yaml")["env_vars"]["LLMSCALE_RUNS"]
    assert runs == "/shared/runs"
    for name in LAUNCHED:
        assert any(f" {runs} " in f"{line} " for line in read(name)["initialization_commands"])


def test_one_ray_and_one_image_everywhere() -> None:
    version = ray_version()
    [base] = re.findall(r"^FROM (\S+)", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)
    assert base == f"rayproject/ray:{version}-py311-gpu"
    assert kubernetes("RayCluster")["spec"]["rayVersion"] == version
    images = {read(name)["docker"]["image"] for name in LAUNCHED}
    images |= {container["image"] for container in containers()}
    assert images == {f"registry.example.com/llmscale:ray-{version}"}
    for path in FOLDER.iterdir():
        assert set(re.findall(r"\b2\.\d+\.0\b", path.read_text())) <= {version}, path.name
        assert (
            set(re.findall(r"registry\.example\.com\S+?ray-[\d.]*\d", path.read_text())) <= images
        )


def test_the_image_does_not_run_as_root() -> None:
    users = re.findall(r"^USER (\S+)", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)
    assert users[-1] == "1000:100"


def test_the_image_is_built_from_files_that_are_there() -> None:
    for line in (FOLDER / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY "):
            sources = [word for word in line.split()[1:-1] if not word.startswith("--")]
            assert sources
            assert all((ROOT / source).exists() for source in sources)


def test_the_runtime_environment_is_one_that_ray_takes() -> None:
    settings = read("runtime_env.yaml")
    assert RuntimeEnv(**settings).to_dict() == settings
    assert settings["working_dir"] == "."


def test_a_stopped_job_has_time_to_save() -> None:
    assert int(read("runtime_env.yaml")["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 120


@pytest.mark.parametrize(
    "path", [".git", ".git/config", ".venv", ".venv/bin/python", "runs", "runs/a/b", "tests/a.py"]
)
def test_what_the_job_does_not_need_is_not_uploaded(path: str) -> None:
    assert _get_excludes(ROOT, read("runtime_env.yaml")["excludes"])(ROOT / path)


@pytest.mark.parametrize(
    "path", ["llmscale/runs.py", "llmscale/cli.py", "recipes/quickstart.yaml", "pyproject.toml"]
)
def test_what_the_job_needs_is_uploaded(path: str) -> None:
    assert (ROOT / path).exists()
    assert not _get_excludes(ROOT, read("runtime_env.yaml")["excludes"])(ROOT / path)


def test_the_rayjob_of_the_readme_runs_on_the_cluster_of_the_file() -> None:
    [text] = re.findall(r"```yaml\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)
    job = yaml.safe_load(text)
    cluster = kubernetes("RayCluster")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert cluster["apiVersion"] == "ray.io/v1"
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    environment = yaml.safe_load(job["spec"]["runtimeEnvYAML"])
    assert environment["env_vars"] == read("runtime_env.yaml")["env_vars"]
    recipe = Path(job["spec"]["entrypoint"].split()[-1]).relative_to("/home/ray/llmscale")
    assert (ROOT / recipe).exists()


def test_the_folder_does_not_hide_the_package_ray() -> None:
    """An __init__.py, or a module, would make `import ray` find this folder first."""
    assert not list(FOLDER.rglob("*.py"))
