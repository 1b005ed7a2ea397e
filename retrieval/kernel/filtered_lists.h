// Copies the visible rows of inverted lists, so that a search among few of them does not read the codes of the others.
//
// Packed codes, as in faiss.IndexIVFPQFastScan: a block of 32 rows has 16 bytes for each code. The lower halves of the
// bytes have rows 0 to 15, the upper halves rows 16 to 31, in the order 0, 8, 1, 9, ... Few rows of a list are visible,
// so a copied list often has at most 16 in its last block. Such a half block has 16 bytes for two codes: of four codes
// the lower halves have the first two, the upper halves the others.

#pragma once

#include "lists.h"

#include <cstdint>

namespace {

// Where the codes of a row are.
class Place {
  public:
    Place(const Lists& lists, int64_t list, int64_t row) {
        const int64_t in_block = row % BLOCK_ROWS, in_half = in_block % HALF_ROWS;
        first_ = row / BLOCK_ROWS * BYTES_OF_CODE * lists.codes_per_row + 2 * (in_half % 8) + in_half / 8;
        shift_ = in_block < HALF_ROWS ? 0 : 4;
        is_half_ = is_half(lists, lists.sizes[list] - (row - in_block));
    }

    int64_t byte(int64_t code) const {
        return first_ + BYTES_OF_CODE * (is_half_ ? code / 4 * 2 + code % 2 : code);
    }

    int shift(int64_t code) const { return is_half_ ? code / 2 % 2 * 4 : shift_; }

  private:
    static constexpr int64_t BYTES_OF_CODE = 16;
    int64_t first_;
    int shift_;
    bool is_half_;
};

void copy_list(const Lists& lists, const uint8_t* visible, int64_t list, const Lists& copies) {
    const int64_t* ids = lists.ids[list];
    int64_t* copied_ids = const_cast<int64_t*>(copies.ids[list]);
    uint8_t* copied_codes = const_cast<uint8_t*>(copies.codes[list]);
    int64_t count = 0;
    for (int64_t i = 0; i < lists.sizes[list]; ++i) {
        if (!visible[ids[i]]) continue;
        const Place from(lists, list, i), to(copies, list, count);
        for (int64_t code = 0; code < lists.codes_per_row; ++code)
            copied_codes[to.byte(code)] |= (lists.codes[list][from.byte(code)] >> from.shift(code) & 15) << to.shift(code);
        copied_ids[count++] = ids[i];
    }
}

} // namespace
