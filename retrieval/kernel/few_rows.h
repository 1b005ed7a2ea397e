// Compares queries with all of a few rows: by 8-bit numbers, and the best of them by their float16 rows.
//
// The 8-bit numbers are half of the bytes, and in one piece. The size of their rounding errors is known, so only rows
// that may be among the best are compared exactly.

#pragma once

#include "inner_products.h"
#include "ranking.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

namespace {

constexpr float ROUNDING_DEVIATIONS = 4; // of a product; two errors differ by more than twice that in 1 of 10^8 pairs

constexpr int64_t NUMBERS_AHEAD = 4;     // rows whose 8-bit numbers are fetched before

// Some rows of a partition. Pointers are borrowed.
struct FewRows {
    int64_t dim;
    int64_t count;
    const int64_t* numbers;  // (count,) in the partition, ascending
    const int8_t* rounded;   // (count, dim) rows / units
    const float* units;      // (count,)
    float largest_unit;
    const uint16_t* rows;    // (rows, dim) float16, of the whole partition
};

class FewRowsSearch {
  public:
    explicit FewRowsSearch(const FewRows& rows) : rows_(rows), scores_(rows.count) {}

    // Writes the k rows most similar to a unit query, best first, (-inf, -1) where there are fewer. Equal similarities
    // are ordered by row.
    void run(const float* query, int64_t k, float* similarities, int64_t* results) {
        const float least = score(query, k);
        best_.clear();
        for (int64_t i = 0; i < rows_.count; ++i)
            if (scores_[i] >= least)
                best_.push_back({inner_product<Half>(query, rows_.rows + rows_.numbers[i] * rows_.dim, rows_.dim),
                                 rows_.numbers[i]});
        const int64_t count = std::min<int64_t>(k, best_.size());
        std::partial_sort(best_.begin(), best_.begin() + count, best_.end());
        for (int64_t i = 0; i < k; ++i) {
            similarities[i] = i < count ? std::clamp(best_[i].similarity, -1.f, 1.f)
                                        : -std::numeric_limits<float>::infinity();
            results[i] = i < count ? best_[i].row : -1;
        }
    }

  private:
    // Fills the scores. Returns the least score of a row that may be among the k best.
    float score(const float* query, int64_t k) {
        query_.set(query, rows_.dim);
        const float unit = query_.unit;
        for (int64_t i = 0; i < rows_.count; ++i) {
            if (i + NUMBERS_AHEAD < rows_.count) fetch(rows_.rounded + (i + NUMBERS_AHEAD) * rows_.dim, rows_.dim);
            scores_[i] = unit * rows_.units[i] * query_.inner_product(rows_.rounded + i * rows_.dim);
        }
        if (k >= rows_.count) return -std::numeric_limits<float>::infinity();
        sorted_ = scores_;
        std::nth_element(sorted_.begin(), sorted_.begin() + k - 1, sorted_.end(), std::greater<float>());
        // The numbers of a row and of the query are rounded by up to half a unit.
        const float deviation = std::sqrt((unit * unit + rows_.largest_unit * rows_.largest_unit) / 12);
        return sorted_[k - 1] - 2 * ROUNDING_DEVIATIONS * deviation;
    }

    const FewRows& rows_;
    std::vector<float> scores_, sorted_;
    RoundedQuery query_;
    std::vector<Neighbor> best_;
};

} // namespace
