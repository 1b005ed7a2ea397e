// SHA-256 (FIPS 180-4) of many texts, of 16 at a time: each lane of a vector belongs to one text.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int TEXTS_AT_ONCE = 16;
constexpr int64_t BLOCK_BYTES = 64;
constexpr int64_t PADDING_BYTES = 9; // least: a byte 0x80, and the length in bits

using Lanes = uint32_t __attribute__((vector_size(4 * TEXTS_AT_ONCE)));

constexpr uint32_t FIRST_STATE[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                     0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
constexpr uint32_t ROUNDS[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

__attribute__((always_inline)) inline Lanes rotated(Lanes words, int bits) { return words >> bits | words << (32 - bits); }

// Adds a block of each text to its state. words: the 16 words of the blocks; overwritten. AVX-512 takes half of the time
// of AVX2.
#ifdef __GLIBC__ // other systems cannot choose a clone when they load a library
__attribute__((target_clones("avx512f", "default")))
#endif
void add_blocks(Lanes (&words)[16], Lanes (&state)[8]) {
    auto [a, b, c, d, e, f, g, h] = state;
    for (int i = 0; i < 64; ++i) {
        Lanes& word = words[i % 16];
        if (i >= 16) {
            const Lanes w15 = words[(i + 1) % 16], w2 = words[(i + 14) % 16];
            word += words[(i + 9) % 16] + (rotated(w15, 7) ^ rotated(w15, 18) ^ w15 >> 3) +
                    (rotated(w2, 17) ^ rotated(w2, 19) ^ w2 >> 10);
        }
        const Lanes first =
            h + (rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25)) + (g ^ (e & (f ^ g))) + ROUNDS[i] + word;
        const Lanes second = (rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22)) + ((a & b) | (c & (a | b)));
        h = g, g = f, f = e, e = d + first, d = c, c = b, b = a, a = first + second;
    }
    const Lanes added[8] = {a, b, c, d, e, f, g, h};
    for (int i = 0; i < 8; ++i) state[i] += added[i];
}

// Writes block `number` of a padded text.
void copy_block(const uint8_t* text, int64_t length, int64_t number, int64_t num_blocks, uint8_t* block) {
    const int64_t start = number * BLOCK_BYTES, copied = std::clamp<int64_t>(length - start, 0, BLOCK_BYTES);
    if (copied < BLOCK_BYTES) std::memset(block, 0, BLOCK_BYTES);
    if (copied) std::memcpy(block, text + start, copied);
    if (length >= start && copied < BLOCK_BYTES) block[copied] = 0x80;
    const uint64_t bits = __builtin_bswap64(8 * length);
    if (number == num_blocks - 1) std::memcpy(block + BLOCK_BYTES - 8, &bits, 8);
}

// Writes the digests of up to 16 texts, 32 bytes each. offsets: of each text and of the end, into `bytes`.
void hash_group(const uint8_t* bytes, const int32_t* offsets, int count, uint8_t* digests) {
    Lanes state[8], words[16] = {}, remaining = {};
    for (int i = 0; i < 8; ++i) state[i] = Lanes{} + FIRST_STATE[i];
    int64_t num_blocks[TEXTS_AT_ONCE], most = 0;
    for (int text = 0; text < count; ++text) {
        num_blocks[text] = (offsets[text + 1] - offsets[text] + PADDING_BYTES + BLOCK_BYTES - 1) / BLOCK_BYTES;
        most = std::max(most, num_blocks[text]);
    }
    for (int64_t number = 0; number < most; ++number) {
        for (int text = 0; text < count; ++text) {
            remaining[text] = number < num_blocks[text] ? ~0u : 0;
            if (!remaining[text]) continue;
            uint32_t block[16];
            copy_block(bytes + offsets[text], offsets[text + 1] - offsets[text], number, num_blocks[text],
                       (uint8_t*)block);
            for (int i = 0; i < 16; ++i) words[i][text] = __builtin_bswap32(block[i]);
        }
        Lanes next[8];
        std::copy(state, state + 8, next);
        add_blocks(words, next);
        for (int i = 0; i < 8; ++i) state[i] = (next[i] & remaining) | (state[i] & ~remaining);
    }
    for (int text = 0; text < count; ++text)
        for (int i = 0; i < 8; ++i) {
            const uint32_t word = __builtin_bswap32(state[i][text]);
            std::memcpy(digests + 32 * text + 4 * i, &word, 4);
        }
}

} // namespace
