"""paho_v5.py HOST PORT: what an MQTT 5 client expects, with paho. Prints "all is well" or raises."""
import queue
import sys

import paho.mqtt.client as mqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

HOST, PORT = sys.argv[1], int(sys.argv[2])
WAIT = 20


class Client:
    """A paho client whose callbacks become queues."""

    def __init__(self, client_id):
        self.events = {name: queue.Queue() for name in ("connect", "message", "subscribe", "publish", "disconnect")}
        self.paho = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=client_id, protocol=mqtt.MQTTv5)
        self.paho.on_connect = lambda c, u, flags, reason, props: self.events["connect"].put((flags, reason, props))
        self.paho.on_message = lambda c, u, message: self.events["message"].put(message)
        self.paho.on_subscribe = lambda c, u, mid, reasons, props: self.events["subscribe"].put(reasons)
        self.paho.on_publish = lambda c, u, mid, reason, props: self.events["publish"].put(reason)
        self.paho.on_disconnect = lambda c, u, flags, reason, props: self.events["disconnect"].put(reason)

    def connect(self, clean, expiry=0):
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = expiry
        self.paho.connect(HOST, PORT, keepalive=30, clean_start=clean, properties=properties)
        self.paho.loop_start()
        return self.next("connect")

    def subscribe(self, topic, **options):
        self.paho.subscribe(topic, options=SubscribeOptions(**options))
        return self.next("subscribe")

    def publish(self, topic, payload, qos=1, **more):
        self.paho.publish(topic, payload, qos=qos, **more)
        return self.next("publish")

    def next(self, what):
        return self.events[what].get(timeout=WAIT)

    def close(self):
        self.paho.disconnect()
        self.next("disconnect")
        self.paho.loop_stop()


def message_properties():
    listener, sender = Client("listener"), Client("sender")
    listener.connect(clean=True)
    assert listener.subscribe("v5/#", qos=1)[0].value == 1
    sender.connect(clean=True)
    properties = Properties(PacketTypes.PUBLISH)
    properties.ResponseTopic = "v5/answer"
    properties.CorrelationData = b"\x00\x01\xff"
    properties.ContentType = "text/plain"
    properties.UserProperty = [("unit", "bar"), ("unit", "psi")]
    assert not sender.publish("v5/pressure", b"3.2", properties=properties).is_failure
    got = listener.next("message")
    assert got.topic == "v5/pressure" and got.payload == b"3.2", got
    assert got.properties.ResponseTopic == "v5/answer", got.properties
    assert got.properties.CorrelationData == b"\x00\x01\xff", got.properties
    assert got.properties.ContentType == "text/plain", got.properties
    assert ("unit", "bar") in got.properties.UserProperty and ("unit", "psi") in got.properties.UserProperty
    listener.close()
    sender.close()


def no_local():
    client = Client("self")
    client.connect(clean=True)
    client.subscribe("own/#", qos=1, noLocal=True)
    client.subscribe("all/#", qos=1)
    client.publish("own/x", b"1")
    client.publish("all/x", b"2")
    assert client.next("message").payload == b"2"
    client.close()


def a_session_until_it_expires():
    client = Client("lasting")
    flags, reason, _ = client.connect(clean=False, expiry=300)
    assert not reason.is_failure and not flags.session_present
    client.subscribe("jobs/#", qos=1)
    client.close()
    sender = Client("sender")
    sender.connect(clean=True)
    sender.publish("jobs/1", b"a")
    sender.close()
    client = Client("lasting")
    flags, _, _ = client.connect(clean=False, expiry=0)
    assert flags.session_present
    assert client.next("message").payload == b"a"
    client.close()
    client = Client("lasting")
    flags, _, _ = client.connect(clean=False)
    assert not flags.session_present, "a session without expiry outlived its connection"
    client.close()


message_properties()
no_local()
a_session_until_it_expires()
print("all is well")
