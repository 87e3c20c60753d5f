"use strict";

// The auctions of both peers in JavaScript, in memory: the rules of Gavel's auctions, and the messages of its live
// protocol. A restart forgets everything.

const { randomUUID } = require("node:crypto");
const { parseArgs } = require("node:util");

const STARTING_PRICE = 1;
const INCREMENT = 1;
const AMOUNT_MAX = 9_999_999_999;
const DAY_MS = 24 * 60 * 60 * 1000;
const HEARTBEAT_MS = 15_000;
const FRAME_BYTES_MAX = 16 * 1024;
const SUBSCRIPTIONS_MAX = 100;
const IN_FLIGHT_MAX = 64;
const REJECTIONS_REMEMBERED = 10_000;

const LIMITS = {
  frame_bytes_max: FRAME_BYTES_MAX,
  amount_max: AMOUNT_MAX,
  subscriptions_max: SUBSCRIPTIONS_MAX,
  in_flight_max: IN_FLIGHT_MAX,
};

class Auction {
  constructor(id, now) {
    this.id = id;
    this.topic = `auction:${id}`;
    this.startTime = now;
    this.endTime = now + DAY_MS;
    this.seq = 1;
    this.price = STARTING_PRICE;
    this.bids = 0;
    this.leader = null;
    this.leaderMax = 0;
    this.paddles = new Map(); // by user
    this.verdicts = new Map(); // of accepted bids, by user and bid_id
  }

  minimum() {
    return this.leader === null ? STARTING_PRICE : this.price + INCREMENT;
  }

  snapshot(now) {
    return {
      auction: this.id,
      story: null,
      title: "An auction of the benchmark",
      currency: "USD",
      status: now < this.endTime ? "active" : "ended",
      starting_price: STARTING_PRICE,
      price: this.price,
      minimum: this.minimum(),
      bids: this.bids,
      leader: this.leader === null ? null : this.paddles.get(this.leader),
      reserve_met: null,
      start_time: this.startTime,
      end_time: this.endTime,
      outcome: null,
    };
  }

  // Why a bid cannot be placed, or null.
  refusal(user, offered, now) {
    if (now >= this.endTime) return { code: "ended", message: "This auction has ended." };
    if (offered < 1) return { code: "amount_invalid", message: "A bid is an amount above zero." };
    if (offered > AMOUNT_MAX) return { code: "amount_too_large", message: "No bid may be so high." };
    if (this.leader === user) {
      if (offered > this.leaderMax) return null;
      return { code: "max_not_raised", message: "You lead already, with a maximum that is not under this one." };
    }
    const minimum = this.minimum();
    if (offered >= minimum) return null;
    return { code: "bid_too_low", message: `The least that can be bid now is ${minimum}.`, minimum };
  }

  // Place a bid that nothing speaks against; returns the event that everybody is to see.
  place(user, offered, isExact, now) {
    this.seq += 1;
    if (this.leader === user) {
      this.leaderMax = offered;
      return { seq: this.seq, at: now, kind: "private" };
    }
    let paddle = this.paddles.get(user);
    if (paddle === undefined) {
      paddle = this.paddles.size + 1;
      this.paddles.set(user, paddle);
    }
    if (this.leader === null || offered > this.leaderMax) {
      if (isExact) this.price = offered;
      else if (this.leader !== null) this.price = Math.min(offered, this.leaderMax + INCREMENT);
      this.leader = user;
      this.leaderMax = offered;
    } else {
      this.price = Math.min(this.leaderMax, offered + INCREMENT);
    }
    this.bids += 1;
    return {
      seq: this.seq,
      at: now,
      kind: "bid_placed",
      paddle,
      price: this.price,
      leader: this.paddles.get(this.leader),
      bids: this.bids,
      minimum: this.minimum(),
      end_time: this.endTime,
      reserve_met: null,
    };
  }
}

class House {
  constructor(count) {
    const now = Date.now();
    this.auctions = new Map();
    for (let number = 0; number < count; number++) {
      const id = `00000000-0000-4000-8000-${number.toString(16).padStart(12, "0")}`;
      this.auctions.set(id, new Auction(id, now));
    }
    this.rejections = new Map(); // the last ones, by auction, user and bid_id
  }

  // What is to be done about a client's message: `answer` goes to the client, who from then on watches the topic `watch`,
  // and `frame` goes to all who watch `frame.topic`. `client` remembers who it is.
  take(client, message) {
    const { op, ref = null } = message;
    if (op === "bid" && client.user !== undefined) return this.bid(client, message, ref);
    if (op === "hello") return { answer: this.welcome(client, message, ref) };
    if (client.user === undefined) return failure(ref, "hello_first", "Say hello first.");
    if (op === "subscribe") return this.subscribe(message, ref);
    return failure(ref, "unknown_op", "The benchmark has no use for this op.");
  }

  welcome(client, message, ref) {
    // The token is the user's id itself, and is believed.
    client.user = message.token ?? null;
    return {
      type: "welcome",
      ref,
      connection: randomUUID(),
      server_time: Date.now(),
      user: client.user,
      role: client.user === null ? null : "viewer",
      expires_at: null,
      heartbeat_ms: HEARTBEAT_MS,
      limits: LIMITS,
    };
  }

  subscribe(message, ref) {
    const auction = this.auctions.get(String(message.topic).slice("auction:".length));
    if (auction === undefined) return { answer: rejected(ref, undefined, NOT_FOUND) };
    const { topic, seq } = auction;
    const snapshot = auction.snapshot(Date.now());
    return { answer: { type: "subscribed", ref, topic, seq, recovered: false, snapshot }, watch: topic };
  }

  bid(client, message, ref) {
    const { auction: id, bid_id, amount = null, max_amount = null } = message;
    const offered = amount ?? max_amount;
    if ((amount === null) === (max_amount === null) || !Number.isSafeInteger(offered)) {
      return failure(ref, "bad_request", "A bid names exactly one of `amount` and `max_amount`, an integer.");
    }
    if (typeof bid_id !== "string") return failure(ref, "bad_request", "`bid_id` is a UUID.");
    if (client.user === null) return { answer: rejected(ref, bid_id, NOT_AUTHENTICATED) };
    const auction = this.auctions.get(id);
    if (auction === undefined) return { answer: rejected(ref, bid_id, NOT_FOUND) };
    const known = client.user + bid_id;
    const verdict = auction.verdicts.get(known);
    if (verdict !== undefined) return { answer: acknowledged(ref, id, bid_id, verdict) };
    const rejection = this.rejections.get(id + known);
    if (rejection !== undefined) return { answer: rejected(ref, bid_id, rejection) };
    const now = Date.now();
    const refusal = auction.refusal(client.user, offered, now);
    if (refusal !== null) {
      this.remember(id + known, refusal);
      return { answer: rejected(ref, bid_id, refusal) };
    }
    const event = auction.place(client.user, offered, amount !== null, now);
    const accepted = {
      seq: event.seq,
      outcome: auction.leader === client.user ? "leading" : "outbid",
      price: auction.price,
      paddle: auction.paddles.get(client.user),
      max_amount: offered,
      minimum: auction.minimum(),
      end_time: auction.endTime,
    };
    auction.verdicts.set(known, accepted);
    return {
      answer: acknowledged(ref, id, bid_id, accepted),
      frame: { type: "events", topic: auction.topic, events: [event] },
    };
  }

  remember(key, refusal) {
    this.rejections.set(key, refusal);
    if (this.rejections.size > REJECTIONS_REMEMBERED) this.rejections.delete(this.rejections.keys().next().value);
  }
}

const NOT_FOUND = { code: "not_found", message: "There is no such auction." };
const NOT_AUTHENTICATED = { code: "not_authenticated", message: "Guests cannot bid." };

function acknowledged(ref, auction, bid_id, accepted) {
  const { seq, ...rest } = accepted;
  return { type: "ack", ref, seq, hash: "", auction, bid_id, ...rest };
}

function rejected(ref, bid_id, { code, message, minimum }) {
  return { type: "rejected", ref, bid_id, code, message, is_transient: false, minimum };
}

function failure(ref, code, message) {
  return { answer: { type: "error", ref, code, message } };
}

// Serve on the port of the command line, and say where, until SIGTERM.
function serve(server, port) {
  server.listen({ host: "127.0.0.1", port, backlog: 2048 }, () => {
    console.log(`ready http://127.0.0.1:${server.address().port}`);
  });
  process.on("SIGTERM", () => process.exit(0));
}

function commandLine() {
  const options = { port: { type: "string", default: "0" }, auctions: { type: "string", default: "1" } };
  const { values } = parseArgs({ options });
  return { port: Number(values.port), auctions: Number(values.auctions) };
}

module.exports = { FRAME_BYTES_MAX, HEARTBEAT_MS, House, commandLine, serve };
