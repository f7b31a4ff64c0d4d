"""The cluster file: what it says, what it costs, and one line for each mistake."""

import pytest
from heliograph.cluster import spec
from heliograph.errors import ProjectError

AWS = """\
name: gpus
provider: aws
region: us-east-1
head: {instance: m6i.large}
nodes:
  l4: {instance: g6.2xlarge, max: 4, spot: true}
"""
LOCAL = """\
name: here
provider: local
head: {cpus: 1}
nodes: {gpu: {cpus: 2, gpus: 1, accelerator: L4, max: 2}}
"""


def loaded(folder, text):
    file = folder / "cluster.yaml"
    file.write_text(text)
    return spec.load(file)


def test_instances_have_parts_and_prices(tmp_path):
    _, capacity = loaded(tmp_path, AWS)
    (group,) = capacity.groups
    assert group.resources == {"CPU": 8.0, "GPU": 1.0, "accelerator_type:L4": 1.0}
    assert (group.dollars, group.at_most, group.most) == (0.9776, True, 4)
    assert capacity.price({"l4": 2}) == pytest.approx(0.096 + 2 * 0.9776)
    assert spec.Capacity.loads(capacity.dumps()) == capacity


def test_a_table_and_a_price_of_ones_own_go_first(tmp_path):
    (tmp_path / "mine.csv").write_text(
        ",".join(spec.COLUMNS) + "\naws,us-east-1,g6.2xlarge,8,32,1,L4,0.9,0.3\naws,us-mars-1,big,64,256,8,H100,9,\n"
    )
    _, capacity = loaded(tmp_path, AWS + "prices: mine.csv\n")
    assert (capacity.groups[0].dollars, capacity.groups[0].at_most) == (0.3, False)
    _, capacity = loaded(tmp_path, AWS.replace("spot: true", "dollars_per_hour: 0.2"))
    assert capacity.groups[0].dollars == 0.2
    mars = AWS.replace("us-east-1", "us-mars-1").replace("m6i.large", "big").replace("g6.2xlarge", "big")
    assert loaded(tmp_path, mars + "prices: mine.csv\n")[1].groups[0].resources["GPU"] == 8


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            AWS.replace("m6i.large", "m6i.larg"),
            "head.instance: us-east-1 has no `m6i.larg`, by the table of prices: did",
        ),
        (AWS.replace("us-east-1", "us-mars-1"), "no prices for aws in us-mars-1: give a table of your own"),
        (AWS + "limits: {nodes: 0}\n", "cluster.yaml:7: limits.nodes: found 0: should be greater than or equal to 1"),
        (AWS.replace("spot", "sport"), "cluster.yaml:6: nodes.l4.sport: unknown key: did you mean `spot`?"),
        (AWS.replace("aws", "asw"), "cluster.yaml:2: provider: found 'asw'"),
        (AWS.replace("max: 4", "max: 4, min: 5"), "min is 5, max is 4"),
        (AWS.replace("instance: g6.2xlarge", "cpus: 8"), "nodes.l4.instance: is missing: name what aws shall start"),
        (AWS.replace("region: us-east-1\n", ""), "region: is missing: where shall aws start nodes?"),
        (LOCAL.replace("cpus: 2", "instance: x"), "nodes.gpu.instance: local has no instances"),
        (LOCAL.replace("name: here\n", ""), "cluster.yaml:1: name: is missing: lower-case letters"),
        (AWS + "prices: none.csv\n", "none.csv: cannot be read (FileNotFoundError)"),
        (AWS + "prices: cluster.yaml\n", "cluster.yaml: is no table of prices: its first line should be provider,"),
        ("nodes: [\n", "cluster.yaml:2"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, text, line):
    with pytest.raises(ProjectError) as raised:
        loaded(tmp_path, text)
    assert line in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_a_damaged_table_says_which_line(tmp_path):
    (tmp_path / "mine.csv").write_text(",".join(spec.COLUMNS) + "\naws,us-east-1,x,many,1,0,,1,\n")
    with pytest.raises(ProjectError, match="line 2 of the table, `aws,us-east-1,x,many"):
        loaded(tmp_path, AWS + "prices: mine.csv\n")


def test_what_instances_are_made_of_is_what_the_provider_says():
    """Against AWS's own catalogue, as moto carries it."""
    import gzip
    import json
    from pathlib import Path

    import moto

    file = Path(moto.__file__).parent / "ec2" / "resources" / "instance_types.json.gz"
    catalogue = json.loads(gzip.decompress(file.read_bytes()))
    ours = [instance for provider, _, instance in spec._lines(spec.CATALOGUE) if provider == "aws"]
    assert len(ours) > 50
    for instance in ours:
        theirs = catalogue[instance.name]
        assert instance.cpus == theirs["VCpuInfo"]["DefaultVCpus"]
        assert instance.memory_gib == theirs["MemoryInfo"]["SizeInMiB"] // 1024
        gpus = theirs.get("GpuInfo", {}).get("Gpus", [])
        assert (instance.gpus, instance.accelerator) == ((gpus[0]["Count"], gpus[0]["Name"]) if gpus else (0, ""))
