"""What generic clients rely on, by the official Python client against the API of a hub.

usage: KUBECONFIG=... kube_semantics.py [CASE ...]

Prints a line for each case that holds. A case that needs the server restarted prints `restart` and goes on when a
line comes back on standard input.
"""

import json
import sys
import threading
import time

import urllib3
from kubernetes import client, config, watch
from kubernetes.client.exceptions import ApiException

config.load_kube_config()
CORE = client.CoreV1Api()
APPS = client.AppsV1Api()
APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
SOON = 20


def config_map(name, labels=None, data=None, **metadata):
    meta = client.V1ObjectMeta(name=name, labels=labels, **metadata)
    return client.V1ConfigMap(metadata=meta, data=data)


def namespace(name):
    return CORE.create_namespace(client.V1Namespace(metadata=client.V1ObjectMeta(name=name)))


def code_of(call, *args, **named):
    """The status of a refusal; 0 if there was none."""
    try:
        call(*args, **named)
        return 0
    except ApiException as refused:
        return refused.status


def until(what, holds):
    ends = time.monotonic() + SOON
    while time.monotonic() < ends:
        found = holds()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"not in time: {what}")


class Informer(threading.Thread):
    """List, watch from there, and again from the last revision seen; after 410 it lists anew."""

    def __init__(self, space, **selectors):
        super().__init__(daemon=True)
        self.space, self.selectors = space, selectors
        self.held, self.events, self.wrong = {}, [], []
        self.lists = self.gone = 0
        self.stop = False

    def run(self):
        revision = None
        while not self.stop:
            try:
                if revision is None:
                    revision = self.list()
                revision = self.watch(revision)
            except ApiException as refused:
                if refused.status == 410:
                    self.gone += 1
                    revision = None
                else:
                    time.sleep(0.05)
            except (urllib3.exceptions.HTTPError, ConnectionError):
                time.sleep(0.05)  # the server restarts

    def list(self):
        page = CORE.list_namespaced_config_map(self.space, **self.selectors)
        self.held = {item.metadata.name: item.metadata.resource_version for item in page.items}
        self.lists += 1
        return page.metadata.resource_version

    def watch(self, revision):
        stream = watch.Watch().stream(
            CORE.list_namespaced_config_map,
            self.space,
            resource_version=revision,
            allow_watch_bookmarks=True,
            timeout_seconds=5,
            **self.selectors,
        )
        for event in stream:
            kind, meta = event["type"], event["object"].metadata
            if kind != "BOOKMARK":
                self.take(kind, meta)
            if int(meta.resource_version) < int(revision):
                self.wrong.append(f"{kind} goes back from {revision} to {meta.resource_version}")
            revision = meta.resource_version
        return revision

    def take(self, kind, meta):
        known = meta.name in self.held
        if known != (kind != "ADDED"):
            self.wrong.append(f"{kind} of {meta.name}, which was {'' if known else 'not '}there")
        if kind == "DELETED":
            self.held.pop(meta.name, None)
        else:
            self.held[meta.name] = meta.resource_version
        self.events.append((kind, meta.name, meta.resource_version))


def patiently(call, *args, **named):
    """Through a restart. Whether a broken write was done is for the caller to find out."""
    for _ in range(400):
        try:
            return call(*args, **named)
        except urllib3.exceptions.HTTPError:
            time.sleep(0.05)
    raise AssertionError("the server did not come back")


def no_event_is_missed_or_invented_across_restarts():
    namespace("informed")
    seen, selected = (Informer("informed", label_selector=chosen) for chosen in ("even", "even=yes"))
    seen.start(), selected.start()
    written, alive = set(), {}

    def change(n):
        name = f"m{n % 30}"
        labels = {"even": "yes" if n % 2 else "no"}
        body = config_map(name, labels=labels, data={"n": str(n)})
        if name not in alive:
            made = patiently(CORE.create_namespaced_config_map, "informed", body)
            alive[name] = labels
            written.add((name, made.metadata.resource_version))
        elif n % 7 == 0:
            patiently(CORE.delete_namespaced_config_map, name, "informed")
            del alive[name]
        else:
            made = patiently(CORE.replace_namespaced_config_map, name, "informed", body)
            alive[name] = labels
            written.add((name, made.metadata.resource_version))

    for n in range(300):
        change(n)
        if n in (100, 200):
            restart()
    page = CORE.list_namespaced_config_map("informed", label_selector="even")
    listed = {item.metadata.name: item.metadata.resource_version for item in page.items}
    assert set(listed) == set(alive), (listed, alive)
    even = {name for name, labels in alive.items() if labels["even"] == "yes"}
    until("the watch of all shows what is there", lambda: seen.held == listed)
    until("that of the selected too", lambda: selected.held == {name: listed[name] for name in even})
    for informer in (seen, selected):
        informer.stop = True
        assert not informer.wrong, informer.wrong
        assert informer.lists <= 3, f"listed {informer.lists} times"
        stray = [e for e in informer.events if e[0] != "DELETED" and (e[1], e[2]) not in written]
        assert not stray, f"states that nobody wrote: {stray[:3]}"
    # With no list in between, every write is an event of its own.
    if seen.lists == 1:
        shown = {(name, rv) for kind, name, rv in seen.events if kind != "DELETED"}
        assert written <= shown, f"missed {sorted(written - shown)[:3]}"


def a_revision_of_before_a_restart_is_gone_or_continued():
    namespace("reborn")
    first = CORE.create_namespaced_config_map("reborn", config_map("a")).metadata.resource_version
    CORE.create_namespaced_config_map("reborn", config_map("b"))
    restart()
    patiently(CORE.read_namespaced_config_map, "b", "reborn")
    names = []
    try:
        stream = watch.Watch().stream(
            CORE.list_namespaced_config_map, "reborn", resource_version=first, timeout_seconds=1
        )
        names = [event["object"].metadata.name for event in stream]
        assert names == ["b"], names
    except ApiException as refused:
        assert refused.status == 410, refused


def a_stale_revision_is_a_conflict():
    stale = CORE.create_namespaced_config_map("default", config_map("stale", data={"k": "1"}))
    fresh = CORE.replace_namespaced_config_map("stale", "default", config_map("stale", data={"k": "2"}))
    stale.data = {"k": "3"}
    assert code_of(CORE.replace_namespaced_config_map, "stale", "default", stale) == 409
    patch = {"metadata": {"resourceVersion": stale.metadata.resource_version}, "data": {"k": "4"}}
    assert code_of(CORE.patch_namespaced_config_map, "stale", "default", patch) == 409
    options = client.V1DeleteOptions(
        preconditions=client.V1Preconditions(resource_version=stale.metadata.resource_version)
    )
    assert code_of(CORE.delete_namespaced_config_map, "stale", "default", body=options) == 409
    other = client.V1DeleteOptions(preconditions=client.V1Preconditions(uid="another"))
    assert code_of(CORE.delete_namespaced_config_map, "stale", "default", body=other) == 409
    held = CORE.read_namespaced_config_map("stale", "default")
    assert held.data == {"k": "2"} and held.metadata.resource_version == fresh.metadata.resource_version


def pages_are_of_one_revision_whatever_is_written():
    namespace("paged")
    for n in range(40):
        CORE.create_namespaced_config_map("paged", config_map(f"p{n:02}", labels={"n": str(n % 2)}))
    for selector in (None, "n=1"):
        named = {} if selector is None else {"label_selector": selector}
        before = CORE.list_namespaced_config_map("paged", **named)
        names, more, revisions, round_ = [], None, set(), 0
        while True:
            page = CORE.list_namespaced_config_map("paged", limit=7, _continue=more, **named)
            names += [item.metadata.name for item in page.items]
            revisions.add(page.metadata.resource_version)
            # Before, at and behind the place where the next page begins.
            for name in ("p00", f"p{round_ * 7 % 40:02}", "p39"):
                CORE.patch_namespaced_config_map(name, "paged", {"data": {"round": str(round_)}})
            CORE.create_namespaced_config_map("paged", config_map(f"q{selector}{round_}".replace("=", "").lower()))
            round_, more = round_ + 1, page.metadata._continue
            if not more:
                break
        assert names == [item.metadata.name for item in before.items], names
        assert len(revisions) == 1 and len(names) >= 20, (revisions, len(names))
        CORE.delete_collection_namespaced_config_map("paged", field_selector="metadata.name!=p00", label_selector="!n")


def selectors_select():
    namespace("picked")
    for name, labels in (("a", {"tier": "web"}), ("b", {"tier": "db"}), ("c", {}), ("d", {"tier": "web", "x": "1"})):
        CORE.create_namespaced_config_map("picked", config_map(name, labels=labels))

    def names(**named):
        items = CORE.list_namespaced_config_map("picked", **named).items
        return "".join(item.metadata.name for item in items if item.metadata.name != "kube-root-ca.crt")

    for selector, wanted in (
        ("tier=web", "ad"),
        ("tier==web,x=1", "d"),
        ("tier!=web", "bc"),
        ("tier in (web, db)", "abd"),
        ("tier notin (web)", "bc"),
        ("tier", "abd"),
        ("!tier", "c"),
        ("tier,!x", "ab"),
    ):
        assert names(label_selector=selector) == wanted, (selector, names(label_selector=selector))
    assert names(field_selector="metadata.name=b") == "b"
    assert names(field_selector="metadata.name!=b", label_selector="tier") == "ad"
    assert code_of(names, label_selector="tier in (") == 400
    assert code_of(names, field_selector="data.k=v") == 400
    # An object that begins or ceases to be selected comes and goes.
    revision = CORE.list_namespaced_config_map("picked").metadata.resource_version
    for labels in ({"tier": "web"}, {"tier": "web", "x": "2"}, {"tier": None, "x": None}):
        CORE.patch_namespaced_config_map("c", "picked", {"metadata": {"labels": labels}})
    stream = watch.Watch().stream(
        CORE.list_namespaced_config_map,
        "picked",
        label_selector="tier=web",
        resource_version=revision,
        timeout_seconds=1,
    )
    kinds = [event["type"] for event in stream]
    assert kinds == ["ADDED", "MODIFIED", "DELETED"], kinds


def apply(manager, data, force=None, name="applied"):
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}
    return CORE.patch_namespaced_config_map(
        name, "default", body, field_manager=manager, force=force, _content_type=APPLY
    )


def applies_conflict_share_and_let_go():
    apply("one", {"a": "1", "b": "1"})
    assert code_of(apply, "two", {"a": "2"}) == 409
    assert CORE.read_namespaced_config_map("applied", "default").data == {"a": "1", "b": "1"}
    apply("two", {"b": "1", "c": "1"})  # equal values are shared
    assert apply("two", {"a": "2", "b": "1"}, force=True).data == {"a": "2", "b": "1"}, "c was its own and went"
    # What one no longer owns stays; what both own stays when one lets go of it.
    assert apply("one", {}).data == {"a": "2", "b": "1"}
    held = CORE.read_namespaced_config_map("applied", "default")
    owners = {entry.manager for entry in held.metadata.managed_fields}
    assert "two" in owners, owners
    before = held.metadata.resource_version
    assert apply("two", {"a": "2", "b": "1"}).metadata.resource_version == before, "nothing changed"
    assert code_of(apply, None, {"a": "2"}) in (400, 422)


def finalizers_hold_and_owners_take_along():
    CORE.create_namespaced_config_map("default", config_map("held", finalizers=["example.com/wait"]))
    CORE.delete_namespaced_config_map("held", "default")
    held = CORE.read_namespaced_config_map("held", "default")
    assert held.metadata.deletion_timestamp
    assert code_of(CORE.create_namespaced_config_map, "default", config_map("held")) == 409
    more = {"metadata": {"finalizers": ["example.com/wait", "example.com/more"]}}
    assert code_of(CORE.patch_namespaced_config_map, "held", "default", more) == 422, "none may be added now"
    CORE.patch_namespaced_config_map("held", "default", {"metadata": {"finalizers": None}})
    assert code_of(CORE.read_namespaced_config_map, "held", "default") == 404

    def family(name):
        owner = CORE.create_namespaced_config_map("default", config_map(name))
        reference = client.V1OwnerReference(
            api_version="v1", kind="ConfigMap", name=name, uid=owner.metadata.uid, block_owner_deletion=True
        )
        CORE.create_namespaced_config_map("default", config_map(f"{name}-child", owner_references=[reference]))

    def gone(name):
        return code_of(CORE.read_namespaced_config_map, name, "default") == 404

    for policy in ("Background", "Foreground"):
        family(policy.lower())
        CORE.delete_namespaced_config_map(policy.lower(), "default", propagation_policy=policy)
        until(f"{policy}: the child goes", lambda name=policy.lower(): gone(f"{name}-child") and gone(name))
    family("orphan")
    CORE.delete_namespaced_config_map("orphan", "default", propagation_policy="Orphan")
    until("the parent goes", lambda: gone("orphan"))
    assert not CORE.read_namespaced_config_map("orphan-child", "default").metadata.owner_references
    # An owner that was never there: what it owns goes.
    absent = client.V1OwnerReference(api_version="v1", kind="ConfigMap", name="never", uid="0-0-0")
    CORE.create_namespaced_config_map("default", config_map("stray", owner_references=[absent]))
    until("the stray goes", lambda: gone("stray"))


def a_namespace_goes_with_all_that_is_in_it():
    namespace("doomed")
    CORE.create_namespaced_config_map("doomed", config_map("plain"))
    CORE.create_namespaced_config_map("doomed", config_map("sticky", finalizers=["example.com/wait"]))
    CORE.delete_namespace("doomed")
    until("all but what is held goes", lambda: code_of(CORE.read_namespaced_config_map, "plain", "doomed") == 404)
    assert CORE.read_namespace("doomed").status.phase == "Terminating"
    assert code_of(CORE.create_namespaced_config_map, "doomed", config_map("late")) == 403
    CORE.patch_namespaced_config_map("sticky", "doomed", {"metadata": {"finalizers": None}})
    until("the namespace goes", lambda: code_of(CORE.read_namespace, "doomed") == 404)


def a_dry_run_writes_nothing():
    namespace("dry")
    CORE.create_namespaced_config_map("dry", config_map("real", data={"k": "1"}))
    before = CORE.list_namespaced_config_map("dry").metadata.resource_version
    all_ = {"dry_run": "All"}
    assert CORE.create_namespaced_config_map("dry", config_map("shadow"), **all_).metadata.uid
    assert CORE.patch_namespaced_config_map("real", "dry", {"data": {"k": "2"}}, **all_).data == {"k": "2"}
    CORE.replace_namespaced_config_map("real", "dry", config_map("real", data={"k": "3"}), **all_)
    CORE.delete_namespaced_config_map("real", "dry", **all_)
    CORE.delete_collection_namespaced_config_map("dry", **all_)
    assert code_of(CORE.create_namespaced_config_map, "dry", config_map("Not_A_Name"), **all_) == 422
    after = CORE.list_namespaced_config_map("dry", label_selector="!none")
    assert "real" in {item.metadata.name for item in after.items}
    assert CORE.read_namespaced_config_map("real", "dry").data == {"k": "1"}
    assert code_of(CORE.read_namespaced_config_map, "shadow", "dry") == 404
    stream = watch.Watch().stream(
        CORE.list_namespaced_config_map, "dry", resource_version=before, timeout_seconds=1
    )
    assert [event["object"].metadata.name for event in stream if event["object"].metadata.name != "kube-root-ca.crt"] == []


def a_write_is_refused_as_a_status():
    try:
        CORE.create_namespaced_config_map("default", config_map("Not_A_Name"))
        raise AssertionError("a name that is none was taken")
    except ApiException as refused:
        status = json.loads(refused.body)
        assert status["kind"] == "Status" and status["reason"] == "Invalid" and refused.status == 422, status
        assert status["details"]["causes"][0]["field"] == "metadata.name", status


def restart():
    print("restart", flush=True)
    assert sys.stdin.readline(), "nobody restarts the server"


CASES = [
    a_stale_revision_is_a_conflict,
    pages_are_of_one_revision_whatever_is_written,
    selectors_select,
    applies_conflict_share_and_let_go,
    finalizers_hold_and_owners_take_along,
    a_namespace_goes_with_all_that_is_in_it,
    a_dry_run_writes_nothing,
    a_write_is_refused_as_a_status,
    no_event_is_missed_or_invented_across_restarts,
    a_revision_of_before_a_restart_is_gone_or_continued,
]

if __name__ == "__main__":
    for case in CASES:
        if len(sys.argv) == 1 or case.__name__ in sys.argv[1:]:
            case()
            print("holds", case.__name__, flush=True)
