// Ranks the candidates of a scan by the inner products of their float16 rows.
//
// Rows are read at random places of the memory, so it begins with the best score and ends when the errors of the scores
// so far say that the rest probably is no neighbor. So `candidates` of the settings is a limit that few queries reach,
// and the caller sorts candidates only as far as they are ranked.

#pragma once

#include "inner_products.h"
#include "lists.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

constexpr int64_t ROWS_AHEAD = 8;     // rows that are fetched before they are ranked
constexpr int64_t ROWS_AT_ONCE = 8;   // that are ranked before it may end
constexpr float ERROR_DEVIATIONS = 4; // a candidate is ranked if an error so far above the mean makes it a neighbor

struct Candidate {
    int64_t row;
    float score;
    uint32_t place; // among all scores, those of repeated rows too
};

struct Neighbor {
    float similarity;
    int64_t row;
    bool operator<(const Neighbor& other) const {
        return similarity != other.similarity ? similarity > other.similarity : row < other.row;
    }
};

// What a thread needs while it ranks. It is kept for the next queries.
struct RankScratch {
    std::vector<Candidate> candidates;
    std::vector<int64_t> slots;
    std::vector<Neighbor> neighbors;
};

class Ranking {
  public:
    Ranking(const Lists& lists, const Settings& settings, RankScratch& scratch)
        : lists_(lists), settings_(settings), scratch_(scratch), neighbors_(scratch.neighbors) {}

    // Takes candidates, best score first; of a repeated row the first. most: how many `add` is called with.
    void start(size_t most) {
        size_t size = 64;
        while (size < 2 * most) size *= 2;
        scratch_.slots.assign(size, -1);
        scratch_.candidates.clear();
        neighbors_.clear();
        next_ = 0;
        first_ = errors_ = squares_ = 0;
    }

    void add(Candidate candidate) {
        auto& slots = scratch_.slots;
        size_t slot = candidate.row * 0x9E3779B97F4A7C15u >> 20;
        for (;; ++slot) {
            int64_t& row = slots[slot & (slots.size() - 1)];
            if (row == candidate.row) return;
            if (row >= 0) continue;
            row = candidate.row;
            scratch_.candidates.push_back(candidate);
            return;
        }
    }

    // Ranks the candidates that were added since the last call. Returns whether later ones may be neighbors too.
    // scale: of the scores.
    bool run(const float* query, float scale) {
        const auto& candidates = scratch_.candidates;
        const int64_t count = candidates.size();
        for (int64_t i = next_; i < std::min(count, next_ + ROWS_AHEAD); ++i) fetch(row(i), 2 * lists_.dim);
        for (; next_ < count; ++next_) {
            const Candidate& candidate = candidates[next_];
            if (next_ >= settings_.k + ROWS_AT_ONCE && next_ % ROWS_AT_ONCE == 0) {
                const float mean = errors_ / next_;
                const float deviation = std::sqrt(std::max(squares_ / next_ - mean * mean, 0.f));
                const float largest = candidate.score + first_ + mean + ERROR_DEVIATIONS * deviation;
                if (largest < scale * neighbors_.front().similarity) return false;
            }
            if (next_ + ROWS_AHEAD < count) fetch(row(next_ + ROWS_AHEAD), 2 * lists_.dim);
            const Neighbor neighbor{inner_product<Half>(query, row(next_), lists_.dim), candidate.row};
            if (!next_) first_ = scale * neighbor.similarity - candidate.score;
            const float error = scale * neighbor.similarity - candidate.score - first_;
            errors_ += error;
            squares_ += error * error;
            keep(neighbor);
        }
        return true;
    }

    // Place of the first candidate that was not ranked, or `all`.
    int64_t ranked(int64_t all) const {
        return next_ < int64_t(scratch_.candidates.size()) ? scratch_.candidates[next_].place : all;
    }

    // Writes the k candidates with the largest inner products.
    void write(float* similarities, int64_t* results) {
        std::sort_heap(neighbors_.begin(), neighbors_.end());
        const int64_t count = neighbors_.size();
        for (int64_t i = 0; i < settings_.k; ++i) {
            similarities[i] = i < count ? std::clamp(neighbors_[i].similarity, -1.f, 1.f)
                                        : -std::numeric_limits<float>::infinity();
            results[i] = i < count ? neighbors_[i].row : -1;
        }
    }

  private:
    // Adds a neighbor if it is one of the k best. The worst of them is at the front.
    void keep(Neighbor neighbor) {
        if (int64_t(neighbors_.size()) == settings_.k) {
            if (!(neighbor < neighbors_.front())) return;
            std::pop_heap(neighbors_.begin(), neighbors_.end());
            neighbors_.pop_back();
        }
        neighbors_.push_back(neighbor);
        std::push_heap(neighbors_.begin(), neighbors_.end());
    }

    const uint16_t* row(int64_t i) const { return lists_.rows + scratch_.candidates[i].row * lists_.dim; }

    const Lists& lists_;
    const Settings& settings_;
    RankScratch& scratch_;
    std::vector<Neighbor>& neighbors_;
    int64_t next_ = 0;                              // the candidate to rank next
    float first_ = 0, errors_ = 0, squares_ = 0;    // of exact numbers minus scores, counted from the first one on
};

} // namespace
