"use strict";

// The peer `socketio`: a broadcasting Socket.IO server, from memory, without a journal. Messages are the objects of the
// live protocol, as payloads of the event "message".
//
// As its documentation has it: a room for each topic ("Rooms"), WebSocket as the only transport ("Server options"), and
// its "Performance tuning": the native addon bufferutil where there is a build of it, and the first HTTP request of each
// connection forgotten. The other WebSocket engine that it names there, eiows, is left out: it wants a newer Node than
// this needs, and on installing it fetches and compiles parts of Node's own source.

const { createServer } = require("node:http");
const { Server } = require("socket.io");
const { FRAME_BYTES_MAX, House, commandLine, serve } = require("./auctions.js");

const { port, auctions } = commandLine();
const house = new House(auctions);
const server = createServer();
const io = new Server(server, {
  transports: ["websocket"],
  perMessageDeflate: false,
  serveClient: false,
  maxHttpBufferSize: FRAME_BYTES_MAX,
});

io.engine.on("connection", (connection) => {
  connection.request = null;
});

io.on("connection", (socket) => {
  const client = {};

  socket.on("message", (message) => {
    if (message === null || typeof message !== "object") {
      socket.disconnect(true);
      return;
    }
    const { answer, watch, frame } = house.take(client, message);
    socket.emit("message", answer);
    if (watch !== undefined) socket.join(watch);
    if (frame !== undefined) io.to(frame.topic).emit("message", frame);
  });
});

serve(server, port);
