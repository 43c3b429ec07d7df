"""Processes exchange values through the hub; what ends one ends all, by name.

Threads of this process stand for the processes.
"""

import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from qlora_jax.errors import UsageError, UserError
from qlora_jax.runs.channel import Channel, PeerError, list_processes, reach
from qlora_jax.runs.directory import run_lock
from qlora_jax.runs.hub import Hub, listen
from qlora_jax.runs.place import Place
from qlora_jax.runs.processes import Peers

# The thread of a channel never ends the tests' process.
NEVER = 1e6


def hello(index, count, **other):
    return {
        "process": index,
        "processes": count,
        "host": f"node{index}",
        "pid": 7,
    } | other


def start(count, limit=10.0):
    """Starts a hub on a free port; returns it and the port."""
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    hub = Hub(listener, count, limit)
    hub.start()
    return hub, port


def each(*calls):
    """Calls functions at the same time; returns their results or errors."""

    def outcome(call):
        try:
            return call()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(outcome, calls))


def join(hub, port, hellos, limit=10.0):
    """Connects; the first is process 0, in the hub's process."""
    first, *others = hellos
    return each(
        lambda: Channel(hub.first, first, limit=limit, grace=NEVER),
        *(
            lambda h=h: reach("127.0.0.1", port, h, limit=limit, grace=NEVER)
            for h in others
        ),
    )


@pytest.fixture
def channels():
    """Channels of three processes."""
    hub, port = start(3)
    channels = join(hub, port, [hello(i, 3) for i in range(3)])
    yield channels
    for channel in channels:
        channel.close()
    hub.join(5)
    assert not hub.is_alive()


@pytest.fixture
def peers(channels):
    """What the three processes hold."""
    return [Peers(Place("h", 1, 3, i), channel) for i, channel in enumerate(channels)]


def test_values_come_back_in_the_order_of_the_processes(peers):
    for round_ in range(3):
        values = each(*(lambda p=p, r=round_: p.gather([p.index, r]) for p in peers))
        assert values == [[[0, round_], [1, round_], [2, round_]]] * 3
    big = "x" * 3_000_000
    assert each(*(lambda p=p: p.broadcast(p.index or big) for p in peers)) == [big] * 3


def test_the_port_is_free_when_all_have_come_and_strangers_change_nothing():
    hub, port = start(2)
    strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
    strangers[0].sendall(b"GET / HTTP/1.1\r\n\r\n")
    strangers[1].sendall(b"x" * 10_000)
    first, second = join(hub, port, [hello(i, 2) for i in range(2)])
    assert [member["host"] for member in first.members] == ["node0", "node1"]
    listen("127.0.0.1", port).close()
    for each_ in (*strangers, first, second):
        each_.close()


@pytest.mark.parametrize(
    ("hellos", "status", "message"),
    [
        ([hello(0, 3), hello(1, 3)], 75, "within 0.5 s; process 2 did not come"),
        ([hello(0, 3)], 75, "processes 1 and 2 did not come"),
        ([hello(0, 2), hello(1, 3)], 2, "`mesh.processes` = 3, and process 0 with 2"),
        ([hello(0, 3), hello(1, 3), hello(1, 3, host="b")], 2, "process 1 of 3: on "),
    ],
)
def test_processes_that_do_not_fit_are_refused_on_all(hellos, status, message):
    hub, port = start(hellos[0]["processes"], limit=0.5)
    for error in join(hub, port, hellos):
        assert isinstance(error, PeerError) and message in str(error)
        assert error.status == status
    hub.join(5)
    assert not hub.is_alive()


def test_another_version_is_refused(monkeypatch):
    hub, port = start(2)
    answers = []

    def first():
        answers.append(each(lambda: Channel(hub.first, hello(0, 2), limit=5))[0])

    thread = threading.Thread(target=first)
    thread.start()
    with socket.create_connection(("127.0.0.1", port)) as other:
        other.sendall(
            b'{"kind": "hello", "version": "0", "process": 1, "processes": 2,'
            b' "host": "old", "pid": 1}\n'
        )
        assert b"has version 0 of qlora-jax" in other.recv(4096)
    thread.join()
    assert answers[0].status == 2


@pytest.mark.parametrize("answer", [None, b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_an_address_without_a_run_is_named_after_the_limit(answer):
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        if answer is None:
            listener.close()
        else:

            def serve():
                while True:
                    try:
                        connection, _ = listener.accept()
                    except OSError:
                        return
                    with connection:
                        connection.recv(4096)
                        connection.sendall(answer)

            threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(PeerError, match=rf"127.0.0.1:{port}` within 0.6 s") as info:
            reach("127.0.0.1", port, hello(1, 2), limit=0.6)
    assert ("not a run" in str(info.value)) == (answer is not None)


def test_who_does_not_answer_is_named(peers):
    errors = each(*(lambda p=p: p.gather(1, "counting", 0.3) for p in peers[:2]))
    for error in errors:
        assert error.status == 75
        assert "counting: process 2 (node2) did not answer within 0.3 s" in str(error)
    with pytest.raises(PeerError, match="did not answer"):  # it hears it when it comes
        peers[2].gather(1, "counting")


def test_who_dies_is_named_once_for_all_that_die_together(peers, channels):
    for channel in channels[1:]:
        channel._closing = True
        channel._socket.shutdown(socket.SHUT_RDWR)
    with pytest.raises(
        PeerError, match=r"Processes 1 \(node1\) and 2 \(node2\) were l"
    ):
        peers[0].gather(1)
    stop = peers[0].explain(ValueError("gloo: connection closed by peer"), 7)
    assert stop.status == 75 and stop.text.startswith("Step 7: Processes 1")


def test_what_ends_without_unwinding_is_cleaned_up_after(
    peers, channels, tmp_path, monkeypatch
):
    monkeypatch.setattr("qlora_jax.runs.channel.leave_at_once", sys.exit)
    made = tmp_path / "new" / "run"
    with run_lock(made) as remove:
        peers[1].before_leaving(remove)
        with pytest.raises(SystemExit):
            channels[1].leave(75, None)
        assert not made.parent.exists()
    Peers().before_leaving(pytest.fail)  # a single process unwinds


def test_the_reason_of_the_first_that_ends_reaches_the_others(peers, channels):
    channels[1].end(143, "terminated")
    assert channels[2].wait_for_stop(5).status == 143
    channels[2].end(1, "later")
    with pytest.raises(
        PeerError, match=r"Process 1 \(node1\) ended: terminated"
    ) as info:
        peers[0].gather(1)
    assert info.value.status == 143


def test_an_error_of_the_process_itself_is_not_blamed_on_others(peers):
    assert peers[0].explain(TypeError("no such axis")) is None
    assert Peers().explain(ValueError("gloo")) is None


def test_processes_at_different_places_are_a_defect(peers):
    calls = (lambda: peers[0].gather(1, "saving"), lambda: peers[1].gather(1, "eval"))
    for error in each(*calls):
        assert "not at the same place" in str(error) and error.status == 1


def test_facts_that_differ_are_named_with_both_values_on_all(peers):
    facts = [{"data": "aa", "base": "b"}, {"data": "aa", "base": "b"}, {"data": "cc"}]
    errors = each(*(lambda p=p: p.agree(facts[p.index]) for p in peers))
    assert all(isinstance(error, UsageError) for error in errors)
    assert len({str(error) for error in errors}) == 1
    assert (
        "data: aa on processes 0 (node0) and 1 (node1); cc on process 2 (node2)"
        in str(errors[0])
    )
    assert "base: b on processes 0 (node0)" in str(errors[0])
    assert each(*(lambda p=p: p.agree(facts[0]) for p in peers)) == [None] * 3


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (UserError("no file"), 1, "failed on process 1 (node1): no file"),
        (UsageError("no option"), 2, "failed on process 1 (node1): no option"),
        (KeyError("x"), 1, "KeyError: 'x'. Its output has the traceback."),
    ],
)
def test_a_failure_of_one_is_raised_by_all(peers, error, status, text):
    def work(peer):
        with peer.together("reading the data"):
            if peer.index == 1:
                raise error

    errors = each(*(lambda p=p: work(p) for p in peers))
    assert errors[1] is error
    for other in (errors[0], errors[2]):
        assert str(other).startswith("Reading the data") and text in str(other)
        assert other.status == status
    # They are still at the same place.
    assert (
        each(*(lambda p=p: p.on_first("asking", lambda: 5) for p in peers)) == [5] * 3
    )


def test_one_process_alone_answers_itself():
    peers = Peers()
    assert peers.is_first and peers.name() == "process 0"
    assert peers.gather(1) == [1] and peers.broadcast("a") == "a"
    peers.agree({"data": "a"})
    with pytest.raises(KeyError), peers.together("reading"):
        raise KeyError
    assert peers.on_first("choosing", lambda: 3) == 3


def test_processes_are_listed_with_their_hosts():
    members = {2: {"host": "a"}}
    assert list_processes([1], members) == "process 1"
    assert list_processes([0, 1, 2], members) == "processes 0, 1 and 2 (a)"
