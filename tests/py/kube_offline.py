"""What a program in a pod does with the API of its node, by the official Python client and its in-cluster
configuration, while the hub is away.

usage: KUBERNETES_SERVICE_HOST=... KUBERNETES_SERVICE_PORT=... kube_offline.py TOKEN-FILE CA-FILE POD
"""

import sys
import threading

from kubernetes import client, watch
from kubernetes.client.exceptions import ApiException
from kubernetes.config.incluster_config import InClusterConfigLoader

token, ca, pod = sys.argv[1:]
InClusterConfigLoader(token_filename=token, cert_filename=ca).load_and_set()
core = client.CoreV1Api()


def code_of(call, *args, **named):
    try:
        call(*args, **named)
        return 0, ""
    except ApiException as refused:
        return refused.status, refused.body


def names(**selectors):
    return [item.metadata.name for item in core.list_namespaced_pod("default", **selectors).items]


assert pod in names(), names()
for selector, wanted in (("app=web", True), ("app in (web, db)", True), ("app!=web", False), ("!app", False)):
    assert (pod in names(label_selector=selector)) == wanted, selector
assert names(field_selector=f"metadata.name={pod}") == [pod]
assert names(field_selector="spec.nodeName=another") == []
page = core.list_namespaced_pod("default")
stream = watch.Watch().stream(
    core.list_namespaced_pod, "default", resource_version=page.metadata.resource_version, timeout_seconds=1
)
assert list(stream) == [], "nothing happens, so nothing is shown"
stream = watch.Watch().stream(core.list_namespaced_pod, "default", label_selector="app=web", timeout_seconds=1)
assert [(event["type"], event["object"].metadata.name) for event in stream] == [("ADDED", pod)]
assert core.read_namespaced_config_map("settings", "default").data == {"mode": "safe"}
assert [node.metadata.name for node in core.list_node().items] == ["edge-1"]

# What is the hub's to decide is not decided here.
for call in (
    lambda: core.list_namespaced_secret("default"),
    lambda: core.read_namespaced_secret("password", "default"),
    lambda: core.list_pod_for_all_namespaces(),
    lambda: core.list_namespace(),
    lambda: core.delete_namespaced_pod(pod, "default"),
    lambda: core.patch_namespaced_pod(pod, "default", {"metadata": {"labels": {"a": "b"}}}),
):
    code, body = code_of(call)
    assert code == 503 and "no link to its hub" in body, (code, body)

client.Configuration.set_default(None)
stranger = client.Configuration.get_default_copy()
stranger.host = f"https://{__import__('os').environ['KUBERNETES_SERVICE_HOST']}:{__import__('os').environ['KUBERNETES_SERVICE_PORT']}"
stranger.ssl_ca_cert = ca
code, body = code_of(client.CoreV1Api(client.ApiClient(stranger)).list_namespaced_pod, "default")
assert code == 401, (code, body)
print("holds", flush=True)
