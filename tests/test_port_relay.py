"""A relayed port: UDP datagrams come and go, and a TCP reader that is slow slows down the writer."""

import asyncio
import socket

from dstack_emu.transport.listen import bind_tcp, bind_udp
from dstack_emu.transport.port_relay import forward_tcp, forward_udp


async def test_datagrams_of_two_clients_get_their_own_answers() -> None:
    loop = asyncio.get_running_loop()
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other,
    ):
        server.bind(("127.0.0.1", 0))
        target: tuple[str, int] = server.getsockname()
        sock = bind_udp("127.0.0.1", 0)
        address = sock.getsockname()
        relay = await forward_udp(sock, lambda: target)
        for each in (server, one, other):
            each.setblocking(False)
        for client, sent in ((one, b"1"), (other, b"2"), (one, b"3")):
            await loop.sock_sendto(client, sent, address)
            data, peer = await asyncio.wait_for(loop.sock_recvfrom(server, 100), 20)
            await loop.sock_sendto(server, data * 2, peer)
            assert await asyncio.wait_for(loop.sock_recv(client, 100), 20) == sent * 2
        await relay.close()


async def test_writer_waits_for_a_reader_that_does_not_read() -> None:
    reading = asyncio.Event()
    received = bytearray()
    size = 64 * 1024 * 1024

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reading.wait()
        while data := await reader.read(1 << 20):
            received.extend(data[:1] * len(data))
        writer.write(b"all")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        target = server.sockets[0].getsockname()
        sock = bind_tcp("127.0.0.1", 0)
        address = sock.getsockname()
        relay = await forward_tcp(sock, lambda: target)
        reader, writer = await asyncio.open_connection(*address)
        writer.write(bytes(size))
        sending = asyncio.ensure_future(writer.drain())
        for _ in range(1000):  # as far as it gets without a reader
            await asyncio.sleep(0)
        assert not sending.done()
        reading.set()
        await sending
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), 20) == b"all"
        assert len(received) == size
        writer.close()
        await relay.close()
