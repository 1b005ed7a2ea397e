// Copies the visible rows of inverted lists, so that a search among few of them does not read the codes of the others.
//
// Packed codes, as in faiss.IndexIVFPQFastScan: a block of 32 rows has 16 bytes for each code. The lower halves of the
// bytes have rows 0 to 15, the upper halves rows 16 to 31, in the order 0, 8, 1, 9, ...

#pragma once

#include "lists.h"

#include <cstdint>

namespace {

constexpr int64_t ROWS_OF_BLOCK = 32, BYTES_OF_CODE = 16;

// Where the codes of a row are: byte of its first code, and bits.
struct Place {
    int64_t byte;
    int shift;
};

Place place(int64_t row, int64_t codes_per_row) {
    const int64_t in_block = row % ROWS_OF_BLOCK, in_half = in_block % 16;
    const int64_t byte = 2 * (in_half % 8) + in_half / 8;
    return {row / ROWS_OF_BLOCK * BYTES_OF_CODE * codes_per_row + byte, in_block < 16 ? 0 : 4};
}

void copy_list(const Lists& lists, const uint8_t* visible, int64_t list, const Lists& copies) {
    const int64_t* ids = lists.ids[list];
    int64_t* copied_ids = const_cast<int64_t*>(copies.ids[list]);
    uint8_t* copied_codes = const_cast<uint8_t*>(copies.codes[list]);
    int64_t count = 0;
    for (int64_t i = 0; i < lists.sizes[list]; ++i) {
        if (!visible[ids[i]]) continue;
        const Place from = place(i, lists.codes_per_row), to = place(count, lists.codes_per_row);
        const uint8_t* source = lists.codes[list] + from.byte;
        uint8_t* target = copied_codes + to.byte;
        for (int64_t code = 0; code < lists.codes_per_row; ++code)
            target[BYTES_OF_CODE * code] |= (source[BYTES_OF_CODE * code] >> from.shift & 15) << to.shift;
        copied_ids[count++] = ids[i];
    }
}

} // namespace
