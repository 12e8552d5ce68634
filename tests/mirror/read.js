// An application that reads an org's credits from Redis, knowing nothing of the gateway: for each org id on standard
// input one line of JSON on standard output.
"use strict";

const readline = require("node:readline");
const Redis = require("ioredis");

const redis = new Redis(process.env.REDIS_URL);

async function read(org) {
  const key = `ai_credits:org_${org}`;
  const credits = await redis.get(key);
  // What such applications ask. A string "0" is true in JavaScript, so an org that has spent everything is no miss.
  if (!credits) {
    return { miss: true };
  }
  return { miss: false, text: credits, credits: parseInt(credits, 10), ttlMs: await redis.pttl(key), type: await redis.type(key) };
}

async function main() {
  for await (const org of readline.createInterface({ input: process.stdin })) {
    console.log(JSON.stringify(await read(org)));
  }
  redis.disconnect();
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
