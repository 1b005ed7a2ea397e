// Finds the lists near a query: a walk through the HNSW graph over the centroids, as in faiss.
//
// It compares centroids in 8-bit numbers, which are half of the bytes that faiss reads. So it can end with other lists
// than faiss. `GraphWalk` reads the structures of `lists.h`, and the caller compares the lists again by bfloat16.

#pragma once

#include "inner_products.h"
#include "lists.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

namespace {

constexpr int32_t LISTS_AHEAD = 4; // lists after the compared one with centroids that are fetched already
constexpr int32_t GROUPS = 256;    // of similarity, by which compared lists are sorted at first
constexpr size_t SPARE_LISTS = 128; // lists beyond the wanted ones that are compared after the leading directions

struct BeamList {
    float similarity;
    int32_t list;
    bool expanded; // whether its links were followed
    bool visited;  // whether its rows were scored
    bool operator<(const BeamList& other) const { return similarity > other.similarity; }
};

// What a thread needs while it walks. It is kept for the next queries.
struct WalkScratch {
    std::vector<uint32_t> seen; // number of the last walk that compared a list
    uint32_t walk = 0;
    std::vector<int32_t> fresh;
    RoundedQuery query, leading_query;
    std::vector<float> parts; // of the query in the leading directions
    std::vector<BeamList> beam, rest, compared;
    std::vector<size_t> ends; // of the groups in `rest`
};

class GraphWalk {
  public:
    GraphWalk(const Lists& lists, WalkScratch& scratch) : lists_(lists), scratch_(scratch), beam_(scratch.beam) {}

    // Moves to the level of all lists.
    void start(const float* query) {
        scratch_.query.set(query, lists_.dim);
        BeamList nearest{0, int32_t(lists_.entry), false, false};
        nearest.similarity = similarity(nearest.list);
        for (int64_t level = lists_.top_level; level > 0; --level) descend(nearest, level);
        if (scratch_.seen.size() != size_t(lists_.num_lists) || !++scratch_.walk) {
            scratch_.seen.assign(lists_.num_lists, 0);
            scratch_.walk = 1;
        }
        scratch_.seen[nearest.list] = scratch_.walk;
        beam_.assign(1, nearest);
        scratch_.rest.clear();
    }

    // Compares all lists that have rows, in place of a walk that would compare most of them. leading: compares in these
    // directions, and later the near lists in all dimensions; null: in all dimensions at once.
    void compare_all(const float* query, const Leading* leading) {
        scratch_.query.set(query, lists_.dim);
        leading_ = leading;
        if (leading) set_leading_query();
        auto& compared = scratch_.compared;
        compared.clear();
        for (int32_t list = 0; list < lists_.num_lists; ++list) {
            if (!leading && list + LISTS_AHEAD < lists_.num_lists) fetch(rounded(list + LISTS_AHEAD), lists_.dim);
            if (lists_.sizes[list])
                compared.push_back({leading ? leading_similarity(list) : similarity(list), list, true, false});
        }
        sort_in_groups();
        beam_.clear();
        compared_all_ = true;
    }

    // Similarity of a list as a number that is comparable with exact ones.
    float scaled(float similarity) const { return similarity * scratch_.query.unit; }

    // Finds the `limit` lists nearest to the query, in the order of the rounded numbers. A later call goes on from the
    // lists that were compared before.
    std::vector<BeamList>& widen(size_t limit) {
        auto& rest = scratch_.rest;
        if (compared_all_) return take(limit);
        beam_.insert(beam_.end(), rest.begin(), rest.end());
        const auto end = beam_.begin() + std::min(limit, beam_.size());
        std::partial_sort(beam_.begin(), end, beam_.end());
        rest.assign(end, beam_.end());
        beam_.erase(end, beam_.end());
        for (size_t next = 0; next < beam_.size();) {
            if (beam_[next].expanded) {
                ++next;
                continue;
            }
            beam_[next].expanded = true;
            next = std::min(next + 1, expand(beam_[next].list, limit));
        }
        return beam_;
    }

  private:
    // Sorts the compared lists by groups of similarity, nearest first, so that `take` sorts only those that it takes.
    void sort_in_groups() {
        const auto& compared = scratch_.compared;
        auto& ends = scratch_.ends;
        ends.assign(GROUPS, 0);
        scratch_.rest.resize(compared.size());
        if (compared.empty()) return;
        const auto [most, least] = std::minmax_element(compared.begin(), compared.end()); // the nearest is the least
        const float top = most->similarity, scale = (GROUPS - 1) / std::max(top - least->similarity, 1e-30f);
        const auto group = [&](const BeamList& near) { return int32_t((top - near.similarity) * scale); };
        for (const auto& near : compared) ++ends[group(near)];
        std::exclusive_scan(ends.begin(), ends.end(), ends.begin(), size_t(0));
        for (const auto& near : compared) scratch_.rest[ends[group(near)]++] = near;
    }

    // Moves at least the nearest `limit` lists to the beam, in whole groups, where all were compared. After the leading
    // directions also SPARE_LISTS, which may be nearer in all dimensions.
    std::vector<BeamList>& take(size_t limit) {
        auto& rest = scratch_.rest;
        const size_t taken = beam_.size(), wanted = std::min(leading_ ? limit + SPARE_LISTS : limit, rest.size());
        size_t end = taken;
        for (auto next = scratch_.ends.begin(); end < wanted; ++next) end = std::max(end, *next);
        if (leading_) compare(rest.begin() + taken, rest.begin() + end);
        std::sort(rest.begin() + taken, rest.begin() + end);
        beam_.insert(beam_.end(), rest.begin() + taken, rest.begin() + end);
        return beam_;
    }

    // Compares lists in all dimensions.
    void compare(std::vector<BeamList>::iterator start, std::vector<BeamList>::iterator end) const {
        for (auto near = start; near != end; ++near) {
            if (end - near > LISTS_AHEAD) fetch(rounded(near[LISTS_AHEAD].list), lists_.dim);
            near->similarity = similarity(near->list);
        }
    }

    // Similarity of a list in the leading directions, comparable only with each other.
    float leading_similarity(int32_t list) const {
        const int8_t* parts = leading_->rounded + list * leading_->dim;
        return leading_->units[list] * scratch_.leading_query.inner_product(parts);
    }

    // Sets the parts of the query in the leading directions.
    void set_leading_query() {
        auto& parts = scratch_.parts;
        parts.resize(leading_->dim);
        for (int64_t i = 0; i < leading_->dim; ++i) {
            const int8_t* direction = leading_->directions + i * lists_.dim;
            parts[i] = leading_->direction_units[i] * scratch_.query.inner_product(direction);
        }
        scratch_.leading_query.set(parts.data(), leading_->dim);
    }

    const int8_t* rounded(int32_t list) const { return lists_.rounded + list * lists_.dim; }

    // Similarity of a list by rounded numbers, comparable only with each other.
    float similarity(int32_t list) const {
        return lists_.units[list] * scratch_.query.inner_product(rounded(list));
    }

    // The links of a list on a level: first and last pointer.
    std::pair<const int32_t*, const int32_t*> links(int32_t list, int64_t level) const {
        const int32_t* first = lists_.links + lists_.first_link[list];
        return {first + lists_.level_links[level], first + lists_.level_links[level + 1]};
    }

    void fetch_links(int32_t list) const {
        auto [first, end] = links(list, 0);
        fetch(first, (end - first) * sizeof(*first));
    }

    // Moves to the nearest list of a level.
    void descend(BeamList& nearest, int64_t level) const {
        for (int32_t start = -1; start != nearest.list;) {
            start = nearest.list;
            auto [link, end] = links(start, level);
            for (; link != end && *link >= 0; ++link) {
                if (link + 1 != end && link[1] >= 0) fetch(rounded(link[1]), lists_.dim);
                float value = similarity(*link);
                if (value > nearest.similarity) nearest = {value, *link, false, false};
            }
        }
    }

    // Compares the linked lists that were not seen. Returns the first changed index of `beam_`, or its size.
    size_t expand(int32_t list, size_t limit) {
        auto& fresh = scratch_.fresh;
        auto [link, end] = links(list, 0);
        fresh.resize(end - link);
        size_t count = 0, first = beam_.size();
        for (; link != end && *link >= 0; ++link) {
            fresh[count] = *link;
            count += scratch_.seen[*link] != scratch_.walk; // without a branch, which would often be predicted wrong
            scratch_.seen[*link] = scratch_.walk;
        }
        for (size_t i = 0; i < count; ++i) {
            if (i + 2 < count) fetch(rounded(fresh[i + 2]), lists_.dim);
            BeamList value{similarity(fresh[i]), fresh[i], false, false};
            if (beam_.size() == limit) {
                const bool enters = value.similarity > beam_.back().similarity;
                scratch_.rest.push_back(enters ? beam_.back() : value);
                if (!enters) continue;
                beam_.pop_back();
            }
            fetch_links(value.list); // which are followed soon
            auto place = std::upper_bound(beam_.begin(), beam_.end(), value);
            first = std::min(first, size_t(place - beam_.begin()));
            beam_.insert(place, value);
        }
        return first;
    }

    const Lists& lists_;
    WalkScratch& scratch_;
    std::vector<BeamList>& beam_;
    bool compared_all_ = false; // instead of a walk
    const Leading* leading_ = nullptr;
};

} // namespace
