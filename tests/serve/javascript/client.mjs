// An Oblivious HTTP client (RFC 9458) that shares nothing with heliograph: @hpke/core seals, bhttp-js writes the messages.
// node client.mjs URL MODEL BODY  ->  a JSON line {outer, status, body} for each suite that the endpoint offers.
import { Aes128Gcm, Aes256Gcm, CipherSuite, DhkemX25519HkdfSha256, HkdfSha256 } from "@hpke/core";
import { BHttpDecoder, BHttpEncoder } from "bhttp-js";

const [url, model, body] = process.argv.slice(2);
const utf8 = new TextEncoder();
const AEADS = { 1: [() => new Aes128Gcm(), 16], 2: [() => new Aes256Gcm(), 32] };
const joined = (...parts) => new Uint8Array(Buffer.concat(parts.map((p) => Buffer.from(p))));

const listed = new Uint8Array(await (await fetch(`${url}/v1/models/${model}/ohttp-keys`)).arrayBuffer());
const view = new DataView(listed.buffer);
const [id, kem, publicKey, suites] = [listed[2], view.getUint16(3), listed.slice(5, 37), view.getUint16(37)];

for (let at = 39; at < 39 + suites; at += 4) {
  const [kdf, aead] = [view.getUint16(at), view.getUint16(at + 2)];
  if (!AEADS[aead]) continue;
  const [make, keyLength] = AEADS[aead];
  const size = Math.max(keyLength, 12);
  const suite = new CipherSuite({ kem: new DhkemX25519HkdfSha256(), kdf: new HkdfSha256(), aead: make() });
  const header = new Uint8Array(7);
  new DataView(header.buffer).setUint8(0, id);
  [kem, kdf, aead].forEach((value, i) => new DataView(header.buffer).setUint16(1 + 2 * i, value));
  const sender = await suite.createSenderContext({
    recipientPublicKey: await suite.kem.deserializePublicKey(publicKey),
    info: joined(utf8.encode("message/bhttp request"), [0], header),
  });
  const path = `${url}/v1/models/${model}:predict`;
  const inner = new Request(path, { method: "POST", body, headers: { "content-type": "application/json" } });
  const sealed = await sender.seal(await new BHttpEncoder().encodeRequest(inner));
  const outer = await fetch(path, {
    method: "POST",
    body: joined(header, new Uint8Array(sender.enc), new Uint8Array(sealed)),
    headers: { "content-type": "message/ohttp-req" },
  });
  const answer = new Uint8Array(await outer.arrayBuffer());
  const secret = await sender.export(utf8.encode("message/bhttp response"), size);
  const salt = joined(new Uint8Array(sender.enc), answer.slice(0, size));
  const key = await crypto.subtle.importKey("raw", secret, "HKDF", false, ["deriveBits"]);
  const derive = (info, length) =>
    crypto.subtle.deriveBits({ name: "HKDF", hash: "SHA-256", salt, info: utf8.encode(info) }, key, 8 * length);
  const opening = await crypto.subtle.importKey("raw", await derive("key", keyLength), "AES-GCM", false, ["decrypt"]);
  const iv = await derive("nonce", 12);
  const message = await crypto.subtle.decrypt({ name: "AES-GCM", iv }, opening, answer.slice(size));
  const response = new BHttpDecoder().decodeResponse(message);
  console.log(JSON.stringify({ aead, outer: outer.status, status: response.status, body: await response.json() }));
}
