// Ranks the candidates of a scan by the inner products of their float16 rows.
//
// Rows are read at random places of the memory, so it begins with the best score and ends when the errors of the scores
// so far say that the rest probably is no neighbor. So `candidates` of the settings is a limit that few queries reach.

#pragma once

#include "inner_products.h"
#include "lists.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

constexpr int64_t ROWS_AHEAD = 4;     // rows that are fetched before they are ranked
constexpr int64_t ROWS_AT_ONCE = 8;   // that are ranked before it may end
constexpr float ERROR_DEVIATIONS = 4; // a candidate is ranked if an error so far above the mean makes it a neighbor

struct Candidate {
    int64_t row;
    float score;
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

    // Writes the k candidates with the largest inner products. scale: of the scores.
    void run(const float* query, float scale, float* similarities, int64_t* results) {
        const auto& candidates = scratch_.candidates;
        const int64_t count = candidates.size();
        neighbors_.clear();
        float first = 0, errors = 0, squares = 0; // of exact numbers minus scores, counted from the first one on
        for (int64_t i = 0; i < std::min(count, ROWS_AHEAD); ++i) fetch(row(i), 2 * lists_.dim);
        for (int64_t i = 0; i < count; ++i) {
            if (i >= settings_.k + ROWS_AT_ONCE && i % ROWS_AT_ONCE == 0) {
                const float mean = errors / i, deviation = std::sqrt(std::max(squares / i - mean * mean, 0.f));
                const float largest = candidates[i].score + first + mean + ERROR_DEVIATIONS * deviation;
                if (largest < scale * neighbors_.front().similarity) break;
            }
            if (i + ROWS_AHEAD < count) fetch(row(i + ROWS_AHEAD), 2 * lists_.dim);
            const Neighbor neighbor{inner_product<Half>(query, row(i), lists_.dim), candidates[i].row};
            if (!i) first = scale * neighbor.similarity - candidates[i].score;
            const float error = scale * neighbor.similarity - candidates[i].score - first;
            errors += error;
            squares += error * error;
            keep(neighbor);
        }
        write(similarities, results);
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

    void write(float* similarities, int64_t* results) {
        std::sort_heap(neighbors_.begin(), neighbors_.end());
        const int64_t count = neighbors_.size();
        for (int64_t i = 0; i < settings_.k; ++i) {
            similarities[i] = i < count ? std::clamp(neighbors_[i].similarity, -1.f, 1.f)
                                        : -std::numeric_limits<float>::infinity();
            results[i] = i < count ? neighbors_[i].row : -1;
        }
    }

    const uint16_t* row(int64_t i) const { return lists_.rows + scratch_.candidates[i].row * lists_.dim; }

    const Lists& lists_;
    const Settings& settings_;
    RankScratch& scratch_;
    std::vector<Neighbor>& neighbors_;
};

} // namespace
