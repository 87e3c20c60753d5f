"use strict";

// The peer `ws`: a broadcasting server on Node's most used WebSocket library, from memory, without a journal.
//
// As its README has it: no compression ("WebSocket compression": off on a server unless asked for), the native addon
// bufferutil where there is a build of it ("Opt-in for performance"), and a broadcast that sends the same bytes to every
// socket that is open ("Server broadcast"), encoded once; and each socket is pinged, and ended if it has not answered the
// last ping ("How to detect and close broken connections"), as often as Gavel does it.

const { createServer } = require("node:http");
const { WebSocket, WebSocketServer } = require("ws");
const { FRAME_BYTES_MAX, HEARTBEAT_MS, House, commandLine, serve } = require("./auctions.js");

const { port, auctions } = commandLine();
const house = new House(auctions);
const watchers = new Map(); // sets of sockets, by topic
const server = createServer();
const sockets = new WebSocketServer({
  server,
  path: "/v1/live",
  perMessageDeflate: false,
  maxPayload: FRAME_BYTES_MAX,
});

sockets.on("connection", (socket) => {
  const client = {};
  const topics = new Set();

  socket.isAlive = true;
  socket.on("pong", () => {
    socket.isAlive = true;
  });

  socket.on("message", (data) => {
    let message;
    try {
      message = JSON.parse(data);
    } catch {
      socket.close(4500);
      return;
    }
    if (message === null || typeof message !== "object") {
      socket.close(4500);
      return;
    }
    const { answer, watch, frame } = house.take(client, message);
    socket.send(JSON.stringify(answer));
    if (watch !== undefined) {
      if (!watchers.has(watch)) watchers.set(watch, new Set());
      watchers.get(watch).add(socket);
      topics.add(watch);
    }
    if (frame !== undefined) broadcast(frame);
  });

  socket.on("close", () => {
    for (const topic of topics) watchers.get(topic).delete(socket);
  });

  // A client that breaks the protocol is closed by the library.
  socket.on("error", () => {});
});

function broadcast(frame) {
  const sockets = watchers.get(frame.topic);
  if (sockets === undefined) return;
  const data = Buffer.from(JSON.stringify(frame));
  for (const socket of sockets) {
    if (socket.readyState === WebSocket.OPEN) socket.send(data, { binary: false });
  }
}

setInterval(() => {
  for (const socket of sockets.clients) {
    if (!socket.isAlive) {
      socket.terminate();
      continue;
    }
    socket.isAlive = false;
    socket.ping();
  }
}, HEARTBEAT_MS);

serve(server, port);
